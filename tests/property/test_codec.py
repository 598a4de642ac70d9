"""The wire: every message round-trips, and no bytes do anything but parse or raise MalformedMessage."""

from __future__ import annotations

import contextlib
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import (
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    chunk_count,
    chunk_length,
    decode_from_device,
    decode_to_device,
    encode,
)
from protocol.columns import MAX_ROWS, Column, SealedColumn, ShareColumn, SignatureColumn
from protocol.errors import MalformedMessage
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import (
    CHUNK_BYTES,
    AdvertiseKeys,
    BlobChunk,
    BlobNeed,
    ClientAbort,
    ConsistencySignature,
    DeviceStatus,
    Invitation,
    ModelAnnouncement,
    Refusal,
    Roster,
    RosterEntry,
    RoundEnd,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    TrainingOrder,
    UnmaskingShares,
    UnmaskRequest,
    UpdateReady,
    UploadOffer,
    UploadReceipt,
)

ROUND = "ab" * 16
BLOB = BlobRef(sha256="cd" * 32, size=100_000)
SIGNED = SignedDocument(kind="plan", payload=b"{}", key_id="00" * 32, signature=bytes(64))
SHARES = SealedColumn.of({3: bytes(82)})
ENTRY = RosterEntry(
    index=0, certificate=bytes(70), encryption_key=bytes(32), mask_key=bytes(32), signature=bytes(64)
)

FROM_DEVICE = [
    DeviceStatus(session=bytes(32), online=True, models={"watch": 3}),
    AdvertiseKeys(
        round_id=ROUND,
        certificate=bytes(70),
        encryption_key=bytes(32),
        mask_key=bytes(32),
        signature=bytes(64),
    ),
    Refusal(round_id=ROUND, code="minimum-cohort", detail="5 needed"),
    ShareKeys(round_id=ROUND, roster_hash=bytes(32), seed_commitment=bytes(32), shares=SHARES),
    UploadOffer(round_id=ROUND, blob=BLOB),
    ConsistencySignature(round_id=ROUND, survivors_hash=bytes(32), signature=bytes(64)),
    UnmaskingShares(
        round_id=ROUND, survivors_hash=bytes(32), shares=ShareColumn.of({2: b"a" * 33, 3: b"b" * 33})
    ),
    UpdateReady(order=ROUND, version=3),
    ClientAbort(round_id=ROUND, code="split-view"),
    BlobNeed(blob=BLOB, indices=(0, 1)),
]
TO_DEVICE = [
    Invitation(plan=SIGNED),
    TrainingOrder(plan=SIGNED, manifest=SIGNED),
    Roster(round_id=ROUND, size=2, root=bytes(32), entries=(ENTRY,)),
    ShareDelivery(round_id=ROUND, roster_hash=bytes(32), shares=SHARES),
    UploadReceipt(round_id=ROUND, blob=BLOB, accepted=True),
    SurvivorSet(round_id=ROUND, survivors=b"\x07"),
    UnmaskRequest(round_id=ROUND, survivors_hash=bytes(32), signatures=SignatureColumn.of({1: bytes(64)})),
    RoundEnd(round_id=ROUND, completed=False, reason="too few"),
    ModelAnnouncement(assignment=SIGNED, manifest=SIGNED),
    ModelAnnouncement(assignment=SIGNED),
    BlobNeed(blob=BLOB, indices=(1,)),
]


@pytest.mark.parametrize("message", FROM_DEVICE, ids=lambda m: m.type)
def test_messages_of_devices_round_trip(message: object) -> None:
    decoded, body = decode_from_device(encode(message))  # type: ignore[arg-type]
    assert decoded == message
    assert not len(body)


@pytest.mark.parametrize("message", TO_DEVICE, ids=lambda m: m.type)
def test_messages_to_devices_round_trip(message: object) -> None:
    decoded, body = decode_to_device(encode(message))  # type: ignore[arg-type]
    assert decoded == message
    assert not len(body)


@pytest.mark.parametrize("message", FROM_DEVICE + TO_DEVICE, ids=lambda m: m.type)
def test_every_truncation_is_refused(message: object) -> None:
    frame = encode(message)  # type: ignore[arg-type]
    decode = decode_from_device if message in FROM_DEVICE else decode_to_device
    for length in range(len(frame)):
        with pytest.raises(MalformedMessage):
            decode(frame[:length])
    with pytest.raises(MalformedMessage, match=r"no body|is no column"):
        decode(frame + b"x")


def test_a_direction_takes_only_its_own_messages() -> None:
    with pytest.raises(MalformedMessage):
        decode_from_device(encode(RoundEnd(round_id=ROUND, completed=True)))
    with pytest.raises(MalformedMessage):
        decode_to_device(encode(ClientAbort(round_id=ROUND, code="x")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ('"v":1', '"v":2'),
        ('"code":"split-view"', '"code":"' + "x" * 41 + '"'),
        ('"code":"split-view"', '"code":"Split View"'),
        ('"detail":""', '"detail":1'),
        ('"detail":""', '"detail":"","extra":1'),
        (f'"round_id":"{ROUND}"', '"round_id":"../../etc/passwd"'),
        (f'"round_id":"{ROUND}"', f'"round_id":"{ROUND.upper()}"'),
        ('"type":"client-abort"', '"type":"unknown"'),
    ],
)
def test_anything_outside_the_schema_is_refused(field: str, value: str) -> None:
    header = ClientAbort(round_id=ROUND, code="split-view").model_dump_json()
    assert field in header
    changed = header.replace(field, value).encode()
    with pytest.raises(MalformedMessage):
        decode_from_device(len(changed).to_bytes(4, "little") + changed)


def test_a_complaint_quotes_no_more_than_a_line() -> None:
    """It goes to the log: a sender must not fill that, nor write lines of its own."""
    status = encode(DeviceStatus(session=bytes(32), online=True, models={}))[4:]
    for header in (
        b'{"type":"' + b"\\n" * 100_000 + b'"}',
        status.replace(b'"models":{}', b'"models":{"a\\nERROR root: \\u001b[2J":1}'),
    ):
        with pytest.raises(MalformedMessage) as caught:
            decode_from_device(len(header).to_bytes(4, "little") + header)
        assert str(caught.value).isprintable() and len(str(caught.value)) <= 200


def test_a_frame_full_of_mistakes_costs_no_more_than_one() -> None:
    """Collecting each of 150,000 kept the aggregator busy for most of a second a message."""
    message = Roster(round_id=ROUND, size=2, root=bytes(32), entries=())
    mistakes = b",".join([b"{}"] * 150_000)
    header = encode(message)[4:].replace(b'"entries":[]', b'"entries":[' + mistakes + b"]")
    started = time.process_time()
    with pytest.raises(MalformedMessage, match="entries"):
        decode_to_device(len(header).to_bytes(4, "little") + header)
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("text", ["\\u001b[2Jfine", "\\u0000", "1.0\\n"])
@pytest.mark.parametrize("field", ["client_version", "runtime"])
def test_what_a_device_says_of_itself_steers_no_terminal(field: str, text: str) -> None:
    """It is kept in the database, where a NUL can be an error, and printed by `covey device list`."""
    status = encode(DeviceStatus(session=bytes(32), online=True, models={}))[4:].decode()
    header = status.replace(f'"{field}":""', f'"{field}":"{text}"').encode()
    with pytest.raises(MalformedMessage, match=field):
        decode_from_device(len(header).to_bytes(4, "little") + header)


def chunk(data: bytes, index: int, size: int) -> BlobChunk:
    return BlobChunk(blob=BlobRef(sha256="cd" * 32, size=size), index=index, crc32=zlib.crc32(data))


def test_a_chunk_carries_exactly_its_bytes() -> None:
    last = bytes(range(100)) * 3
    size = CHUNK_BYTES + len(last)
    decoded, body = decode_from_device(encode(chunk(last, 1, size), last))
    assert (decoded, bytes(body)) == (chunk(last, 1, size), last)
    for message, data in (
        (chunk(last, 1, size), last[:-1]),  # one byte short
        (chunk(last, 1, size), last + b"x"),  # one byte long
        (chunk(last, 2, size), last),  # beyond the end
        (chunk(last, 1, size), last[:-1] + b"x"),  # checksum
    ):
        with pytest.raises(MalformedMessage):
            decode_from_device(encode(message, data))


def test_oversize_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MalformedMessage, match="over"):
        decode_from_device(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(MalformedMessage, match="does not fit"):
        decode_from_device((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + b"{}")
    with pytest.raises(MalformedMessage, match="too large"):
        encode(chunk(b"", 0, CHUNK_BYTES), bytes(CHUNK_BYTES + 1))


@given(st.integers(1, 10 * CHUNK_BYTES))
def test_chunks_cover_a_blob_exactly(size: int) -> None:
    assert sum(chunk_length(size, i) for i in range(chunk_count(size))) == size


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_raise_anything_else(data: bytes, framed: bool) -> None:
    frame = len(data).to_bytes(4, "little") + data if framed else data
    for decode in (decode_from_device, decode_to_device):
        with pytest.raises(MalformedMessage):
            decode(frame)


@settings(max_examples=300)
@given(st.sampled_from(FROM_DEVICE + TO_DEVICE), st.data())
def test_a_damaged_message_parses_or_is_refused(message: object, data: st.DataObject) -> None:
    frame = bytearray(encode(message))  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_from_device, decode_to_device):
        with contextlib.suppress(MalformedMessage):
            decode(bytes(frame))


# --- columns ---------------------------------------------------------------------------------------------

COLUMNS = [FROM_DEVICE[3], FROM_DEVICE[6], TO_DEVICE[3], TO_DEVICE[6]]


def column_of(message: object) -> Column:
    return next(value for value in vars(message).values() if isinstance(value, Column))


def with_body(message: object, body: bytes) -> bytes:
    """The frame of a message with another body."""
    frame = encode(message)  # type: ignore[arg-type]
    return frame[: 4 + int.from_bytes(frame[:4], "little")] + body


def body_of(peers: list[int], width: int, *, rows: int | None = None) -> bytes:
    count = len(peers) if rows is None else rows
    indices = b"".join(peer.to_bytes(2, "little") for peer in peers)
    return count.to_bytes(2, "little") + indices + bytes(width * len(peers))


def decode_any(message: object, frame: bytes) -> object:
    decode = decode_from_device if message in FROM_DEVICE else decode_to_device
    return decode(frame)[0]


@pytest.mark.parametrize("message", COLUMNS, ids=lambda m: m.type)
def test_a_column_is_two_arrays_and_nothing_else(message: object) -> None:
    column = column_of(message)
    peers, width = [0, 1, 7, 255, 256, 2**16 - 1], column.width
    values = {peer: bytes([i]) * width for i, peer in enumerate(peers)}
    body = body_of(peers, 0) + b"".join(values.values())
    decoded = column_of(decode_any(message, with_body(message, body)))
    assert (decoded.indices(), decoded.by_peer()) == (peers, values)
    assert decoded == type(column).of(values) and decoded.to_body() == body
    none = column_of(decode_any(message, with_body(message, bytes(2))))
    assert none.by_peer() == {} and none == type(column)()


@pytest.mark.parametrize("message", COLUMNS, ids=lambda m: m.type)
@pytest.mark.parametrize(
    ("peers", "rows"),
    [([1, 1], None), ([2, 1], None), ([0, 1, 2, 2], None), ([1, 2], 1), ([1, 2], 3), ([1, 2], 0), ([], 1)],
    ids=["repeated", "reordered", "repeated last", "rows left over", "rows missing", "hidden", "claimed"],
)
def test_a_column_that_is_none_is_refused(message: object, peers: list[int], rows: int | None) -> None:
    body = body_of(peers, column_of(message).width, rows=rows)
    with pytest.raises(MalformedMessage, match="column"):
        decode_any(message, with_body(message, body))


@pytest.mark.parametrize("message", COLUMNS, ids=lambda m: m.type)
def test_a_share_of_a_wrong_length_is_no_message(message: object) -> None:
    width = column_of(message).width
    for wrong in {0, 32, 33, 34, 64, 81, 82, 83} - {width}:
        with pytest.raises(MalformedMessage, match=f"no column of {width}-byte values"):
            decode_any(message, with_body(message, body_of([3], wrong)))
    with pytest.raises(ValueError, match=f"are not {width} for each"):
        type(column_of(message)).of({3: bytes(width), 4: bytes(width - 1)})


@pytest.mark.parametrize("message", COLUMNS, ids=lambda m: m.type)
def test_a_column_has_a_row_for_each_client_of_the_largest_graph_and_no_more(message: object) -> None:
    width = column_of(message).width
    largest = with_body(message, body_of(list(range(MAX_ROWS)), width))
    assert len(encode(decode_any(message, largest))) == len(largest)  # type: ignore[arg-type]
    with pytest.raises(MalformedMessage, match="no column"):
        decode_any(message, with_body(message, body_of(list(range(MAX_ROWS + 1)), width)))


@pytest.mark.parametrize("message", COLUMNS, ids=lambda m: m.type)
def test_a_column_in_the_header_is_refused(message: object) -> None:
    """Two places for one thing would be two readings of one message."""
    header = message.model_dump_json().encode()  # type: ignore[attr-defined]
    with pytest.raises(MalformedMessage, match="belongs in the body"):
        decode_any(message, len(header).to_bytes(4, "little") + header + column_of(message).to_body())


@settings(max_examples=200)
@given(st.sampled_from(COLUMNS), st.binary(max_size=400))
def test_any_body_is_one_column_or_none(message: object, body: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        assert column_of(decode_any(message, with_body(message, body))).to_body() == body
