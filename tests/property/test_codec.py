"""The wire: every message round-trips, and no bytes do anything but parse or raise MalformedMessage."""

from __future__ import annotations

import base64
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
from protocol.errors import MalformedMessage
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import (
    CHUNK_BYTES,
    AddressedShares,
    AdvertiseKeys,
    BlobChunk,
    BlobNeed,
    ClientAbort,
    ConsistencySignature,
    DeviceStatus,
    Invitation,
    ModelAnnouncement,
    PeerShare,
    Refusal,
    Roster,
    RosterEntry,
    RoundEnd,
    ShareDelivery,
    ShareKeys,
    SignedBy,
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
SHARES = (AddressedShares(peer=3, sealed=bytes(82)),)
PEER_SHARES = (PeerShare(peer=3, share=bytes(33)),)
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
    UnmaskingShares(round_id=ROUND, survivors_hash=bytes(32), seed_shares=PEER_SHARES, key_shares=()),
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
    UnmaskRequest(
        round_id=ROUND, survivors_hash=bytes(32), signatures=(SignedBy(peer=1, signature=bytes(64)),)
    ),
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
    with pytest.raises(MalformedMessage, match="no body"):
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
    message = ShareKeys(round_id=ROUND, roster_hash=bytes(32), seed_commitment=bytes(32), shares=())
    mistakes = b",".join([b"{}"] * 150_000)
    header = encode(message)[4:].replace(b'"shares":[]', b'"shares":[' + mistakes + b"]")
    started = time.process_time()
    with pytest.raises(MalformedMessage, match="shares"):
        decode_from_device(len(header).to_bytes(4, "little") + header)
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


@pytest.mark.parametrize("length", [0, 32, 34, 81, 83])
def test_a_share_of_a_wrong_length_is_no_message(length: int) -> None:
    text = base64.urlsafe_b64encode(bytes(length)).decode()
    shares = FROM_DEVICE[6].model_dump_json().replace(base64.urlsafe_b64encode(bytes(33)).decode(), text)
    sealed = FROM_DEVICE[3].model_dump_json().replace(base64.urlsafe_b64encode(bytes(82)).decode(), text)
    for header in (shares.encode(), sealed.encode()):
        assert text in header.decode()
        with pytest.raises(MalformedMessage, match="shares"):
            decode_from_device(len(header).to_bytes(4, "little") + header)
