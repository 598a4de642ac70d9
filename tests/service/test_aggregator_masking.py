"""What the aggregator gets to see of one device: uniform bytes, and nothing else, anywhere in its storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from protocol import ring, topics
from protocol.codec import decode_from_device
from protocol.messages import BlobChunk
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing, toy_input
from tests.toy_rounds import REQUEST, check_completed

LEVEL = 1e-6
"""False-alarm rate of each statistical statement here; there are five of them."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, parameters=60_000)
    yield bench
    bench.close()


def uniform(data: bytes) -> bool:
    """Pearson's chi-squared test of the bytes against the uniform distribution, at LEVEL."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return bool(chi2.sf(statistic, 255) > LEVEL)


def test_what_arrives_of_one_device_is_uniform_and_its_update_is_nowhere_in_storage(bench: Bench) -> None:
    arrived: dict[str, bytearray] = {name: bytearray() for name in bench.devices}

    def tap(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if topic.endswith("/up/chunk"):
            chunk, body = decode_from_device(frame)
            assert isinstance(chunk, BlobChunk)
            place = topics.parse_up(topic)
            assert place is not None
            arrived[place[0]] += body
        return [message]

    bench.filter = tap
    campaign = bench.start(REQUEST)
    storage = b""
    plain: dict[str, bytes] = {}
    while bench.operator.campaign(campaign.campaign_id).status in ("waiting", "running"):
        bench.step()
        storage += b"".join(path.read_bytes() for path in bench.path.glob("aggregator.db*"))
        for name, device in bench.devices.items():
            if device.blob and name not in plain:
                encoding = device.encoding()
                plain[name] = ring.pack(toy_input(name, encoding), encoding.bits)
    (view,) = bench.rounds()
    check_completed(bench, view)

    assert len(plain) == len(bench.devices)
    for name, update in plain.items():
        assert len(arrived[name]) == len(update)
        assert not uniform(update), "the test has no power"
        assert uniform(bytes(arrived[name]))
        for start in range(0, len(update) - 64, len(update) // 50):
            assert update[start : start + 64] not in storage
