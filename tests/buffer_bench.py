"""The real service and real cores of devices in one process, in simulated time.

How long a device trains is set; nothing else takes time, so that what is measured is who waits for whom.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest, Mode
from edge_client.events import Connected
from edge_client.outputs import PrepareUpdate, Train
from edge_client.profile import Profile
from models.weights import decode_weights
from protocol import topics
from protocol.codec import decode_to_device, encode
from protocol.identity import SignedDocument, create_request
from protocol.messages import DeviceStatus, FromDevice
from protocol.plan import Plan
from tests.aggregator_bench import START, Bench
from tests.aggregator_devices import Outgoing
from tests.edge_fleet import PERMISSIVE, FakeDevice

PARAMETERS = 200


class CoreDevice:
    """A device whose core is the real one; its disk is a dictionary, its training takes `seconds`."""

    def __init__(self, bench: Bench, number: int, seconds: float) -> None:
        self.device_id = f"device-{number}"
        self.seconds = seconds
        self.online = True
        identity = Ed25519PrivateKey.generate()
        bundle = bench.operator.enrol(create_request(identity, self.device_id))
        self.core = FakeDevice(self.device_id)
        self.core.profile = Profile.enrolled(bundle, identity, policy=PERMISSIVE)
        self.core.delta = np.random.default_rng(number).normal(size=bench.parameters).astype(np.float32)
        self.trained = 0
        self._clock = bench.clock
        self._done_at: float | None = None

    # --- as the bench sees a device

    def birth(self) -> Outgoing:
        self.online = True
        self._sync()
        self.core.give(Connected())
        return self._up(DeviceStatus(session=bytes(32), online=True, client_version="test", models={}))

    def will(self) -> Outgoing:
        self.online = False
        return self._up(DeviceStatus(session=bytes(32), online=False, models={}))

    def repeat(self) -> list[Outgoing]:
        return []

    def receive(self, frame: bytes) -> list[Outgoing]:
        self._sync()
        message, body = decode_to_device(frame)
        self.core.receive(message, bytes(body))
        return self._flush()

    # --- time

    def tick(self) -> list[Outgoing]:
        """Lets the device see the time, and do what is done by now."""
        self._sync()
        self.core.tick()
        while self.core.jobs:
            if isinstance(self.core.jobs[0], Train | PrepareUpdate):
                if self._done_at is None:
                    self._done_at = self._clock.now + self.seconds
                if self._clock.now < self._done_at:
                    break
                self.trained += 1
            self._done_at = None
            self.core.work(1)
        return self._flush()

    def kill(self) -> None:
        """SIGKILL, and another process at once: what is not on disk is gone."""
        self._done_at = None
        self._sync()
        self.core.reboot()

    def _sync(self) -> None:
        self.core.steady, self.core.unix = self._clock.now, int(START + self._clock.now)

    def _up(self, message: FromDevice) -> Outgoing:
        channel: topics.UpChannel = "status" if isinstance(message, DeviceStatus) else "msg"
        return topics.up(self.device_id, channel), encode(message)

    def _flush(self) -> list[Outgoing]:
        frames = [self._up(message) for message in self.core.take()]
        topic = topics.up(self.device_id, "chunk")
        frames += [(topic, encode(chunk, body)) for chunk, body in self.core.chunks]
        self.core.chunks.clear()
        return frames if self.online else []


class BufferBench(Bench):
    """A service around devices that train for so many seconds each."""

    def __init__(self, path: Path, seconds: list[float], *, parameters: int = PARAMETERS) -> None:
        super().__init__(path, devices=0, parameters=parameters)
        self.cores = {f"device-{n}": CoreDevice(self, n, each) for n, each in enumerate(seconds)}
        self.devices = self.cores  # type: ignore[assignment]
        self.boot()

    def step(self, seconds: float = 0.1) -> None:
        super().step(seconds)
        for device in self.cores.values():
            self.deliver(*device.tick())

    def expected(self, view: RoundView) -> NDArray[np.float32]:
        """What a buffer must give: the base and the mean of the clipped updates, by their weights."""
        base = self.operator.model("toy", view.record.base_version)
        clip_norm = _plan(view).privacy.clip_norm
        total = np.zeros(self.parameters)
        for device_id in view.report.survivors:
            delta = self.cores[device_id].core.delta.astype(np.float64)
            clipped = delta * min(1.0, clip_norm / np.linalg.norm(delta))
            total += clipped / np.sqrt(1 + self.staleness(view)[device_id])
        mean = total / len(view.report.survivors)
        return (decode_weights(base.weights, base.manifest) + mean).astype(np.float32)

    def staleness(self, view: RoundView) -> dict[str, int]:
        """How old each update of a round was, as the devices themselves noted it."""
        return {
            name: note.fields["staleness"]
            for name, device in self.cores.items()
            for note in device.core.notes
            if note.event in ("update-collected", "trained") and note.fields["round"] == view.record.round_id
        }

    def check(self, view: RoundView) -> None:
        """A round completed, and its version is the exact weighted mean."""
        assert view.record.status == "completed", (view.record.code, view.record.detail)
        model = self.operator.model("toy", view.record.version)
        weights = decode_weights(model.weights, model.manifest)
        np.testing.assert_allclose(weights, self.expected(view), atol=1e-3)

    def check_once(self) -> None:
        """Every training is in one buffer at most: no device contributed more often than it trained."""
        for device in self.cores.values():
            rounds = [item.entry.round_id for item in device.core.disk.ledger]
            assert len(rounds) == len(set(rounds))
            assert sum(item.entry.task.kind == "train" for item in device.core.disk.ledger) <= device.trained


def _plan(view: RoundView) -> Plan:
    return Plan.from_bytes(SignedDocument.model_validate_json(view.record.plan).payload)


def buffered(buffers: int, size: int, **changes: object) -> CampaignRequest:
    """A buffered campaign of the toy model."""
    values = {"rounds": buffers, "cohort": size, "mode": Mode.BUFFERED, "seed": 1, **changes}
    return CampaignRequest("toy", **values)  # type: ignore[arg-type]
