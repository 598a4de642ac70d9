"""Real device processes over a real broker: models come, rounds are taken part in, kills are survived."""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from deploy.broker import BrokerProcess
from edge_client.policy import DevicePolicy
from models import zoo
from models.weights import encode_weights
from protocol import ring
from protocol.codec import chunk_count
from protocol.dp.mechanism import decode
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    Invitation,
    RoundEnd,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import PLAN_KIND, CohortParameters, Plan, TrainingParameters, TrainTask
from protocol.round_encoding import round_encoding
from protocol.secagg import server
from protocol.secagg.masking import apply_masks
from protocol.secagg.server_state import Collecting, Failed, Recovered, ServerContext, ServerState
from tests.edge_broker import FLEET, Device, Fleet, Hub, command, running, wait_for

POLICY = DevicePolicy(minimum_cohort=3, minimum_survivors=2, maximum_epsilon=None)
WATCH = zoo.load("watch")
WEIGHTS = encode_weights(np.array(WATCH.weights))


class Round:
    """The aggregator of one round, in the test: the real server machine behind the hub."""

    def __init__(self, hub: Hub, fleet: Fleet, devices: list[str]) -> None:
        now = int(time.time())
        self.plan = Plan(
            fleet=FLEET,
            round_id=secrets.token_hex(16),
            task=TrainTask(
                model="watch",
                base_version=1,
                manifest_sha256=WATCH.manifest.sha256(),
                training=TrainingParameters(local_epochs=1, learning_rate=0.05),
            ),
            privacy=PrivacyParameters(
                mode=PrivacyMode.DISTRIBUTED,
                clip_norm=1.0,
                noise_multiplier=0.01,
                delta=1e-5,
                bits=24,
                metric_slots=(MetricSlot(name="examples", bound=100.0, share=1.0),),
            ),
            cohort=CohortParameters(size=4, minimum=3, minimum_survivors=2),
            issued_at=now,
            expires_at=now + 600,
        )
        self.document = SignedDocument.create(fleet.operator, PLAN_KIND, self.plan.to_bytes())
        self.encoding = round_encoding(self.plan, self.document.digest, WATCH.manifest.parameter_count)
        self.hub, self.devices = hub, devices
        self.state: ServerState = server.begin(
            ServerContext(
                fleet=FLEET,
                round_id=self.plan.round_id,
                plan_hash=self.document.digest,
                ca=fleet.ca,
                invited=frozenset(devices),
                minimum_cohort=3,
                minimum_survivors=2,
                graph=self.plan.cohort.graph,
            )
        )
        self.total = np.zeros(self.encoding.length, np.uint32)
        self.parts: dict[str, dict[int, bytes]] = {}
        self.stored: dict[str, BlobRef] = {}

    def ask(self) -> None:
        for device_id in server.awaited(self.state):
            request = server.request(self.state, device_id)
            self.hub.send(device_id, request or Invitation(plan=self.document))

    def phase(self, kind: type, seconds: float = 120.0, missing: int = 0) -> None:
        """Runs until a phase is over: asks every second, takes answers, pulls uploads."""
        assert isinstance(self.state, kind) or kind is object, self.state
        deadline, next_ask = time.monotonic() + seconds, 0.0
        while len(server.awaited(self.state)) > missing:
            assert time.monotonic() < deadline, (type(self.state), server.awaited(self.state))
            if time.monotonic() >= next_ask:
                self.ask()
                next_ask = time.monotonic() + 1.0
            try:
                device_id, message, body = self.hub.heard.get(timeout=0.1)
            except queue.Empty:
                continue
            self.hear(device_id, message, body)
        self.state = server.handle(self.state, server.ClosePhase())
        assert not isinstance(self.state, Failed), self.state

    def hear(self, device_id: str, message: object, body: bytes) -> None:
        if isinstance(message, UploadOffer):
            if device_id in self.stored:
                self.receipt(device_id, message.blob)
            else:
                self.need(device_id, message.blob)
        elif isinstance(message, BlobChunk):
            self.parts.setdefault(message.blob.sha256, {})[message.index] = body
            self.need(device_id, message.blob)
        elif not isinstance(message, BlobNeed):
            try:
                received = server.Received(device_id, message, int(time.time()))  # type: ignore[arg-type]
                self.state = server.handle(self.state, received)
            except server.IllegalEvent:
                return

    def need(self, device_id: str, blob: BlobRef) -> None:
        have = self.parts.setdefault(blob.sha256, {})
        missing = [i for i in range(chunk_count(blob.size)) if i not in have]
        if missing:
            self.hub.send(device_id, BlobNeed(blob=blob, indices=tuple(missing[:4])))
        elif device_id not in self.stored and isinstance(self.state, Collecting):
            data = b"".join(have[i] for i in sorted(have))
            vector = ring.unpack(data, self.encoding.length, self.encoding.bits)
            self.total = ring.add(self.total, vector, self.encoding.bits)
            self.stored[device_id] = blob
            self.state = server.handle(self.state, server.InputStored(device_id))
            self.receipt(device_id, blob)

    def receipt(self, device_id: str, blob: BlobRef) -> None:
        self.hub.send(device_id, UploadReceipt(round_id=self.plan.round_id, blob=blob, accepted=True))

    def mean(self) -> tuple[np.ndarray, dict[str, float]]:
        assert isinstance(self.state, Recovered)
        total = self.total.copy()
        apply_masks(total, self.state.masks)
        total &= np.uint32(ring.modulus_mask(self.encoding.bits))
        return decode(total, len(self.state.survivors), self.encoding)

    def end(self) -> None:
        for device_id in self.devices:
            self.hub.send(device_id, RoundEnd(round_id=self.plan.round_id, completed=True))


def run_json(*arguments: object) -> dict[str, object]:
    done = subprocess.run(
        command(*arguments, "--json"), capture_output=True, text=True, check=True, timeout=60
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("broker", ["mosquitto", pytest.param("amqtt", marks=pytest.mark.e2e)], indirect=True)
def test_devices_take_part_in_rounds_and_survive_kills(broker: BrokerProcess, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    names = [f"device-{i}" for i in range(4)]
    devices = {
        name: Device(fleet.enrolled(name, POLICY), fleet.data(name, WATCH.manifest), broker) for name in names
    }
    with Hub(broker) as hub, running(*devices.values()):
        hub.publish(WATCH.manifest, WATCH.graph, WEIGHTS, fleet.operator)
        wait_for(lambda: all(hub.serving(n) == {"watch": 1} for n in names), what="the first version")

        # A round in which one device is killed after every phase, and comes back.
        first = Round(hub, fleet, names)
        victim = devices["device-0"]
        first.phase(object)
        victim.kill()
        victim.start()
        first.phase(object)
        victim.kill()
        victim.start()
        first.phase(Collecting)
        victim.kill()
        victim.start()
        first.phase(object)
        first.phase(object)
        mean, metrics = first.mean()
        assert len(first.stored) == 4 and metrics["examples"] == pytest.approx(40, abs=2)
        assert 0 < float(np.linalg.norm(mean)) <= 1.1
        first.end()

        # A round in which one device is killed after its shares were delivered, and stays away.
        second = Round(hub, fleet, names)
        second.phase(object)
        second.phase(object)
        devices["device-1"].kill()
        second.phase(Collecting, missing=1)
        second.phase(object)
        second.phase(object)
        assert len(second.stored) == 3
        second.end()
        devices["device-1"].start()

        # A new version, which a device answers predictions with while it runs.
        weights = encode_weights((WATCH.weights + mean).astype(np.float32))
        hub.publish(WATCH.manifest.next_version(weights), WATCH.graph, weights, fleet.operator)
        wait_for(lambda: all(hub.serving(n) == {"watch": 2} for n in names), what="the second version")
        np.save(tmp_path / "window.npy", np.zeros(WATCH.manifest.input.shape, np.float32))
        state = victim.state
        answer = run_json("predict", "--state", state, "--input", tmp_path / "window.npy")
        assert answer["version"] == 2 and len(answer["predictions"]) == 1  # type: ignore[arg-type]
        status = run_json("status", "--state", state)
        assert status["running"] and status["contributions"] == 2 and status["active_round"] is None
        assert [m["version"] for m in status["models"]] == [1, 2]  # type: ignore[attr-defined]
        assert len(run_json("privacy", "--state", state)["entries"]) == 2  # type: ignore[arg-type]

        peak = max(device.peak_bytes() for device in devices.values())
        limit = 66 if find_spec("tflite_runtime") else 80  # ai-edge-litert is larger by itself
        assert peak < limit * 2**20, f"{peak / 2**20:.0f} MiB"
        assert all(device.stop() == 0 for device in devices.values())
        wait_for(lambda: not any(hub.online(n) for n in names), what="the offline statuses")
    assert "Traceback" not in "".join(device.log.read_text() for device in devices.values())
