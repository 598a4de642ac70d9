"""The aggregator's end of a real broker, for tests of real device processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import paho.mqtt.client as paho
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from deploy.broker import BrokerProcess
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models.manifest import ModelManifest
from protocol import topics
from protocol.codec import decode_from_device, encode
from protocol.enrolment import EnrolmentBundle
from protocol.identity import SignedDocument, create_ca, issue_certificate, open_request
from protocol.messages import BlobNeed, DeviceStatus, FromDevice, ModelAnnouncement, ToDevice
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment

FLEET = "barn"


@dataclass
class Fleet:
    """Keys of a fleet, and its devices' state directories."""

    directory: Path
    ca_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    operator: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def __post_init__(self) -> None:
        self.ca = create_ca(self.ca_key, FLEET, now=int(time.time()), days=30, serial=1)

    def bundle(self, request: bytes, device_id: str) -> EnrolmentBundle:
        """What the operator hands out for a signing request."""
        _, public_key = open_request(request)
        signer = (self.operator.public_key().public_bytes_raw(),)
        certificate = issue_certificate(
            self.ca_key, self.ca, device_id, public_key, now=int(time.time()), days=30, serial=2
        )
        return EnrolmentBundle(
            fleet=FLEET,
            device_id=device_id,
            certificate=certificate,
            ca=self.ca,
            plan_signers=signer,
            model_signers=signer,
        )

    def enrolled(self, device_id: str, policy: DevicePolicy) -> Path:
        """The state directory of a device that is ready to run, with some data beside it."""
        state = self.directory / device_id
        enrol(state, self.bundle(initialise(state, device_id), device_id))
        set_policy(state, policy)
        return state

    def data(self, device_id: str, manifest: ModelManifest, count: int = 40) -> Path:
        """A directory with examples that the model takes."""
        directory = self.directory / f"{device_id}-data"
        directory.mkdir(exist_ok=True)
        generator = np.random.default_rng(int.from_bytes(device_id.encode()[-4:], "big"))
        np.savez(
            directory / "examples.npz",
            x=generator.normal(size=(count, *manifest.input.shape)).astype(np.float32),
            y=generator.integers(0, len(manifest.labels), count).astype(np.int32),
        )
        return directory


class Hub:
    """A client of the broker that hears every device and can speak to each."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="hub", protocol=MQTTProtocolVersion.MQTTv311
        )
        self.heard: queue.SimpleQueue[tuple[str, FromDevice, bytes]] = queue.SimpleQueue()
        self.statuses: list[tuple[str, DeviceStatus]] = []
        self.blobs: dict[str, bytes] = {}
        self._broker = broker
        self._client.on_message = self._on_message
        self._client.on_connect = lambda client, *_: client.subscribe(topics.UPLINKS, 1)

    def __enter__(self) -> Self:
        """Connects and subscribes."""
        self._client.connect(self._broker.host, self._broker.port)
        self._client.loop_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnects."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:
        parsed = topics.parse_up(message.topic)
        if parsed is None:
            return
        device_id, _channel = parsed
        content, body = decode_from_device(bytes(message.payload))
        if isinstance(content, DeviceStatus):
            self.statuses.append((device_id, content))
        elif isinstance(content, BlobNeed) and content.blob.sha256 in self.blobs:
            data = self.blobs[content.blob.sha256]
            for chunk, part in chunks(content.blob, data, content.indices):
                self._client.publish(topics.down(device_id, "chunk"), encode(chunk, part), qos=1)
        else:
            self.heard.put((device_id, content, bytes(body)))

    def publish(self, manifest: ModelManifest, graph: bytes, weights: bytes, operator: Any) -> None:
        """Announces a version, and serves its files from now on."""
        self.blobs |= {manifest.graph.sha256: graph, manifest.weights.sha256: weights}
        assignment = VersionAssignment(
            fleet=FLEET,
            model=manifest.name,
            version=manifest.version,
            manifest_sha256=manifest.sha256(),
            sequence=manifest.version,
        )
        announcement = ModelAnnouncement(
            assignment=SignedDocument.create(operator, ASSIGNMENT_KIND, assignment.to_bytes()),
            manifest=SignedDocument.create(operator, MODEL_KIND, manifest.to_bytes()),
        )
        self._client.publish(topics.model(manifest.name), encode(announcement), qos=1, retain=True)

    def send(self, device_id: str, message: ToDevice) -> None:
        """Sends a message to one device."""
        self._client.publish(topics.down(device_id, "msg"), encode(message), qos=1)

    def expel(self, device_id: str) -> None:
        """Ends a device's connection as a bad link does: the broker drops it for another of its client id."""
        other = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=device_id, protocol=MQTTProtocolVersion.MQTTv311
        )
        taken = threading.Event()
        other.on_connect = lambda *_: taken.set()
        other.connect(self._broker.host, self._broker.port)
        other.loop_start()
        assert taken.wait(120)
        other.disconnect()
        other.loop_stop()

    def send_raw(self, device_id: str, frame: bytes) -> None:
        """Sends any bytes to one device."""
        self._client.publish(topics.down(device_id, "msg"), frame, qos=1)

    def last_status(self, device_id: str) -> DeviceStatus | None:
        """The newest status of a device."""
        return next((status for name, status in reversed(self.statuses) if name == device_id), None)

    def serving(self, device_id: str) -> dict[str, int]:
        """The versions that a device says it serves, if it is online."""
        status = self.last_status(device_id)
        return dict(status.models) if status is not None and status.online else {}

    def online(self, device_id: str) -> bool:
        """Whether a device's newest status says that it is there."""
        status = self.last_status(device_id)
        return status is not None and status.online


def wait_for(condition: Callable[[], object], seconds: float = 120.0, what: str = "the condition") -> None:
    """Waits until a condition holds.

    The limit is for what never comes, not for slow machines: it is generous everywhere.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.02)


def command(*arguments: object) -> list[str]:
    """The command line of `covey-edge`."""
    return [sys.executable, "-m", "edge_client.main", *map(str, arguments)]


class Device:
    """A `covey-edge run` process that can be killed and started again."""

    def __init__(self, state: Path, data: Path | None, broker: BrokerProcess, *options: str) -> None:
        self.state = state
        self.log = state.with_suffix(".log")
        self.environment: dict[str, str] = {}
        # Without a directory, examples come from what edge.toml says.
        own = [] if data is None else ["--data", data]
        self._command = command(
            *("run", "--priority", "normal", "--state", state, "--broker", broker.url, *own),
            *("--model", "watch", *options),
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process."""
        with self.log.open("ab") as log:
            # As the bundle's launcher sets it.
            own = {"PYTHONNODEBUGRANGES": "1", "PYTHONOPTIMIZE": "2"}
            environment = {
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[1]),
                **own,
                **self.environment,
            }
            self._process = subprocess.Popen(self._command, stderr=log, env=environment)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def wait(self, seconds: float) -> int:
        """Waits until it has ended; returns its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ends it by SIGTERM; returns its exit code."""
        if self._process is None or self._process.poll() is not None:
            return -1 if self._process is None else int(self._process.returncode)
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def peak_bytes(self) -> int:
        """Peak resident memory so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@contextmanager
def running(*devices: Device) -> Iterator[None]:
    """Runs devices, and leaves none behind."""
    try:
        for device in devices:
            device.start()
        yield
    finally:
        for device in devices:
            device.stop()
