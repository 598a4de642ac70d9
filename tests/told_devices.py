"""Devices that have what they are told, as the broker retains it, by an aggregator that may be killed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from protocol import topics
from protocol.codec import decode_to_device, encode
from protocol.messages import DeviceStatus, ModelAnnouncement, VersionFailure
from protocol.version_assignment import VersionAssignment
from tests.aggregator_devices import Outgoing

MODEL = "toy"


class ToldDevices:
    """Devices that serve version 1 at first, and then what they are told: their own, else the fleet's.

    Attributes:
        had: versions of each device, in the order in which it came to them.
    """

    def __init__(self, names: Iterable[str], *, bad: int | None = None) -> None:
        """Takes the devices' ids, and the version that runs on none of them."""
        self.had: dict[str, list[int]] = {name: [1] for name in names}
        self._bad = bad
        self._told: dict[str, tuple[int, int | None]] = {}

    def hear(self, topic: str, payload: bytes) -> list[Outgoing]:
        """Takes in what is retained on a topic; returns what the devices say that change by it."""
        message = decode_to_device(payload)[0]
        assert isinstance(message, ModelAnnouncement)
        assignment = VersionAssignment.from_bytes(message.assignment.payload)
        sequence, version = self._told.get(topic, (0, None))
        assert assignment.sequence >= sequence, "an older assignment after a newer one"
        if assignment.sequence == sequence:
            assert assignment.version == version, "two assignments of one sequence"
        self._told[topic] = (assignment.sequence, assignment.version)
        said = []
        for name, had in self.had.items():
            own = self._told.get(topics.own_model(name, MODEL), (0, None))[1]
            wanted = own or self.of_fleet
            if wanted is not None and wanted != had[-1]:
                had.append(wanted)
                said.append(self.status(name))
        return said

    @property
    def of_fleet(self) -> int | None:
        """What those are to have that have nothing of their own."""
        return self._told.get(topics.model(MODEL), (0, None))[1]

    def status(self, name: str) -> Outgoing:
        """What a device says of itself."""
        version, failures = self.had[name][-1], {}
        if version == self._bad:
            failures = {MODEL: VersionFailure(version=version, code="model-unusable")}
            version = 1
        status = DeviceStatus(session=bytes(32), online=True, models={MODEL: version}, failures=failures)
        return topics.up(name, "status"), encode(status)


class ToldFleet:
    """Such devices at a real broker, behind one connection.

    Attributes:
        errors: what they were told and must not have been.
    """

    def __init__(self, devices: ToldDevices, host: str, port: int) -> None:
        self.devices = devices
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="fleet")
        self._client.on_connect, self._client.on_message = self._on_connect, self._on_message
        self._client.connect(host, port)

    def had(self) -> dict[str, list[int]]:
        """Versions of each device so far."""
        with self._lock:
            return {name: list(had) for name, had in self.devices.had.items()}

    def settled(self, version: int) -> bool:
        """Whether the fleet is to have this version, and every device has it."""
        with self._lock:
            return self.devices.of_fleet == version and all(
                had[-1] == version for had in self.devices.had.values()
            )

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        client.subscribe([(topics.model(MODEL), 1), (topics.own_model("+", MODEL), 1)])
        with self._lock:
            for name in self.devices.had:
                client.publish(*self.devices.status(name), qos=1, retain=True)

    def _on_message(self, client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        try:
            with self._lock:
                said = self.devices.hear(message.topic, bytes(message.payload))
            for topic, frame in said:
                client.publish(topic, frame, qos=1, retain=True)
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Self:
        self._client.loop_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()
