"""What the aggregator gets to see of one device, with everything real: broker, service and device processes.

An observer on the broker collects every upload; the aggregator's files are read while the round runs. The
updates are small numbers around zero, so anything that is not masked is far from uniform.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pytest

from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from deploy.demo.fleet import Fleet, device_policy, fleet
from deploy.demo.processes import ProcessGroup
from models import zoo
from models.datasets import watch
from protocol import ring
from protocol.codec import decode_from_device
from protocol.dp.parameters import PrivacyMode
from protocol.errors import MalformedMessage
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk
from protocol.plan import Plan
from protocol.round_encoding import round_encoding
from tests.edge_broker import wait_for

MODEL = Path(zoo.__file__).parent / "watch"
BITS = 18
# 255 degrees of freedom: the 1 - 1e-6 quantile of chi-squared is 376.9; the same for each of the 4 checks.
CHI_SQUARED_LIMIT = 380.0


def chi_squared(values: np.ndarray, bits: int) -> float:
    """Of the top eight bits of ring elements against the uniform distribution."""
    counts = np.bincount(values >> (bits - 8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


class Observer:
    """Collects every chunk that devices send."""

    def __init__(self, url: str) -> None:
        self.uploads: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
        self.sizes: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="observer")
        self._client.on_message = self._take
        host, port = url.removeprefix("mqtt://").split(":")
        self._client.connect(host, int(port))
        self._client.subscribe("covey/v1/dev/+/up/chunk", qos=1)
        self._client.loop_start()

    def _take(self, client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        try:
            chunk, body = decode_from_device(message.payload)
        except MalformedMessage:
            return
        if isinstance(chunk, BlobChunk):
            key = (message.topic.split("/")[3], chunk.blob.sha256)
            with self._lock:
                self.uploads[key][chunk.index] = bytes(body)
                self.sizes[key] = chunk.blob.size

    def whole(self) -> list[bytes]:
        with self._lock:
            joined = (b"".join(chunks[i] for i in sorted(chunks)) for chunks in self.uploads.values())
            return [data for data, size in zip(joined, self.sizes.values(), strict=True) if len(data) == size]

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def finish(running: Fleet, campaign_id: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while running.operator.campaign(campaign_id).status not in ("finished", "failed"):
        assert time.monotonic() < deadline, "the round did not end"
        time.sleep(0.05)


@pytest.mark.timeout(180)
def test_one_masked_input_is_uniform_on_the_wire_and_gone_from_storage() -> None:
    people = watch.load()[:4]
    with (
        BrokerProcess() as broker,
        ProcessGroup() as processes,
        fleet(
            processes, broker.url, "wire", MODEL, people, [], device_policy(PrivacyMode.DISTRIBUTED, 3)
        ) as running,
    ):
        observer = Observer(broker.url)
        running.wait_for_version("watch", 1, 60)
        request = CampaignRequest(
            "watch",
            rounds=1,
            cohort=4,
            minimum=4,
            min_survivors=3,
            privacy=PrivacyMode.DISTRIBUTED,
            noise_multiplier=0.02,
            bits=BITS,
            local_epochs=1,
        )
        campaign = running.operator.start_rounds(request)
        finish(running, campaign.campaign_id)
        (view,) = running.operator.rounds(campaign.campaign_id)
        # It may hear them a little later than the aggregator.
        wait_for(lambda: len(observer.whole()) >= 4, what="four uploads")
        observer.stop()
        uploads = observer.whole()
        for process in running.devices.values():
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "tflite_runtime" in maps or "ai_edge_litert" in maps
            assert "libtensorflow" not in maps
            assert "/scipy" not in maps
        database = running.directory / "aggregator" / "aggregator.db"
        stored = b"".join(path.read_bytes() for path in database.parent.glob("aggregator.db*"))
        tables = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        names = [row[0] for row in tables.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        left = {name: tables.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in names}  # noqa: S608
        tables.close()

    assert view.record.status == "completed", view.record
    assert len(view.report.survivors) == 4
    assert len(uploads) == 4
    document = SignedDocument.model_validate_json(view.record.plan)
    plan = Plan.from_bytes(document.payload)
    length = round_encoding(plan, document.digest, zoo.load("watch").manifest.parameter_count).length
    for data in uploads:
        assert len(data) == ring.packed_size(length, BITS)
        assert chi_squared(ring.unpack(data, length, BITS), BITS) < CHI_SQUARED_LIMIT
        assert data[:64] not in stored, "a masked input outlived its round"
    # The test would notice: an update that is encoded and not masked is far from uniform.
    plain = np.random.default_rng(1).normal(0, 500, length).astype(np.int64).astype(np.uint32)
    assert chi_squared(plain & ring.modulus_mask(BITS), BITS) > 100 * CHI_SQUARED_LIMIT
    assert not any(left[name] for name in left if "chunk" in name or "sum" in name or "upload" in name), left
