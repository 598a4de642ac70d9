"""Masked inputs that come up, and artefacts that go down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from aggregator.downloads import BURST_BYTES, DownloadLimits
from protocol import topics
from protocol.codec import decode_to_device, encode
from protocol.messages import CHUNK_BYTES, BlobChunk, BlobNeed, UploadOffer, UploadReceipt
from protocol.transfer import describe
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing, SimulatedDevice
from tests.toy_rounds import REQUEST, check_completed, phase

# --- uploads


def _intercept_offer(bench: Bench, name: str, change: Callable[[SimulatedDevice], bytes]) -> None:
    """Changes what a device uploads, just before it offers it."""

    def apply(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        device = bench.devices[name]
        if topic == topics.up(name, "msg") and b'"upload-offer"' in frame[:120] and device.plan is not None:
            device.blob = change(device)
            offer = UploadOffer(round_id=device.plan.round_id, blob=describe(device.blob))
            return [(topic, encode(offer))]
        return [message]

    bench.filter = apply


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda device: device.blob[:-1], "wrong-size"),
        (lambda device: device.blob + b"\0", "wrong-size"),
        (lambda device: device.blob * 2, "wrong-size"),
    ],
)
def test_an_input_of_another_size_is_refused_and_not_waited_for(
    bench: Bench, change: Callable[[SimulatedDevice], bytes], code: str
) -> None:
    original: dict[str, bytes] = {}

    def once(device: SimulatedDevice) -> bytes:
        original.setdefault(device.device_id, device.blob)
        device_blob = device.blob
        device.blob = original[device.device_id]
        result = change(device)
        device.blob = device_blob
        return result

    _intercept_offer(bench, "device-1", once)
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    assert "device-1" not in view.report.survivors
    assert bench.devices["device-1"].refused[0].code == code
    report = phase(view, "MaskedInput")
    assert report.dropped == ("device-1",)
    assert report.ended is not None
    assert report.ended - report.started < 2


def test_content_that_is_not_what_was_offered_is_refused(wide: Bench) -> None:
    """A sender that lies about its digest: the checksums of its chunks are right, the whole is not."""
    import zlib

    def corrupt(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if topic != topics.up("device-1", "chunk"):
            return [message]
        size = int.from_bytes(frame[:4], "little")
        chunk = BlobChunk.model_validate_json(frame[4 : 4 + size])
        body = bytes([frame[4 + size] ^ 1]) + frame[5 + size :]
        return [(topic, encode(chunk.model_copy(update={"crc32": zlib.crc32(body)}), body))]

    wide.filter = corrupt
    (view,) = wide.finish(wide.start(REQUEST))
    check_completed(wide, view)
    assert "device-1" not in view.report.survivors
    assert wide.devices["device-1"].refused[0].code == "wrong-digest"


def test_an_accepted_input_gets_its_receipt_again_and_another_one_is_refused(bench: Bench) -> None:
    bench.devices["device-0"].mute = {"upload-offer"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: len(bench.operator.live_rounds()[:1]) == 1 and bench.devices["device-1"].accepted)
    device = bench.devices["device-1"]
    assert device.plan is not None
    round_id, blob = device.plan.round_id, describe(device.blob)
    bench.transport.sent.clear()
    for offered in (blob, describe(b"y" * blob.size)):
        bench.deliver((topics.up("device-1", "msg"), encode(UploadOffer(round_id=round_id, blob=offered))))
    bench.clock.now += 0.1
    bench.service.step(0)
    answers = [decode_to_device(frame)[0] for topic, frame in bench.transport.sent if "device-1/" in topic]
    receipts = [answer for answer in answers if isinstance(answer, UploadReceipt)]
    assert [(receipt.accepted, receipt.code) for receipt in receipts] == [
        (True, "stored"),
        (False, "another-stored"),
    ]
    bench.devices["device-0"].mute = set()
    (view,) = bench.finish(campaign)
    check_completed(bench, view)


def test_an_offer_after_the_phase_is_refused(bench: Bench) -> None:
    device = bench.devices["device-1"]
    device.mute = {"upload-offer"}
    for other in bench.devices.values():
        if other is not device:
            other.mute = {"consistency-signature"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "ConsistencyCheck")
    device.mute = set()
    bench.deliver(*device.repeat())
    bench.step()
    assert [receipt.code for receipt in device.refused] == ["too-late"]
    for other in bench.devices.values():
        other.mute = set()
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert "device-1" not in view.report.survivors


def test_chunks_that_nobody_asked_for_are_dropped(bench: Bench) -> None:
    import zlib

    body = b"z" * 100
    chunk = BlobChunk(blob=describe(body), index=0, crc32=zlib.crc32(body))
    bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    bench.deliver((topics.up("device-0", "chunk"), encode(chunk, body)))
    bench.step()
    round_id = bench.rounds()[0].record.round_id
    with bench.repository.read() as reader:
        assert reader.uploads(round_id) == ()


# --- downloads


def test_devices_pull_artefacts_in_bounded_steps(bench: Bench) -> None:
    model = bench.operator.model("toy")
    parts: dict[int, bytes] = {}
    for blob, data in ((model.manifest.graph, model.graph), (model.manifest.weights, model.weights)):
        parts.clear()
        need = BlobNeed(blob=blob, indices=(0, 1, 2, 999))
        bench.deliver((topics.up("device-0", "msg"), encode(need)))
        bench.clock.now += 0.1
        bench.service.step(0)
        for topic, frame in bench.transport.sent:
            if topic == topics.down("device-0", "chunk"):
                message, body = decode_to_device(frame)
                assert isinstance(message, BlobChunk)
                parts[message.index] = bytes(body)
        bench.transport.sent.clear()
        assert b"".join(parts[index] for index in sorted(parts)) == data


def test_a_device_that_asks_without_end_is_served_within_limits(bench: Bench) -> None:
    """Each request is answered with a thousand times its size, which the broker keeps until it is read."""
    blob = bench.operator.model("toy").manifest.graph
    need = encode(BlobNeed(blob=blob, indices=(0,)))
    topic = topics.down("device-0", "chunk")
    burst = BURST_BYTES // CHUNK_BYTES
    for _ in range(3 * burst):
        bench.deliver((topics.up("device-0", "msg"), need))
    bench.deliver((topics.up("device-1", "msg"), need))
    for _ in range(4):
        bench.service.step(0)
    served = [place for place, _ in bench.transport.sent]
    assert served.count(topic) == burst and topics.down("device-1", "chunk") in served
    bench.clock.now += 1.0
    bench.deliver((topics.up("device-0", "msg"), need))
    bench.service.step(0)
    assert [place for place, _ in bench.transport.sent].count(topic) == burst + 1


def test_a_fleet_has_a_download_limit_where_its_operator_sets_one(bench: Bench) -> None:
    bench.downloads = DownloadLimits(device_rate=CHUNK_BYTES, fleet_rate=2 * CHUNK_BYTES)
    bench.boot()
    need = encode(BlobNeed(blob=bench.operator.model("toy").manifest.graph, indices=(0,)))

    def served() -> list[str]:
        bench.transport.sent.clear()
        bench.deliver(*((topics.up(name, "msg"), need) for name in bench.devices))
        bench.service.step(0)
        return [topic for topic, _ in bench.transport.sent if topic.endswith("chunk")]

    assert len(served()) == 2 and served() == []
    bench.clock.now += 0.5
    assert len(served()) == 1
    with pytest.raises(ValidationError):
        DownloadLimits(device_rate=1000)


def test_only_published_artefacts_are_served(bench: Bench) -> None:
    secret = bench.store.put(b"not published")
    bench.deliver((topics.up("device-0", "msg"), encode(BlobNeed(blob=secret, indices=(0,)))))
    bench.service.step(0)
    assert [topic for topic, _ in bench.transport.sent if topic.endswith("chunk")] == []
