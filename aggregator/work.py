"""One unit of work: everything that a batch of messages changes, made durable before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aggregator.clock import Moment
from aggregator.records import Assigned, Version
from aggregator.registry.publishing import document_of
from aggregator.repository import Repository, Writer
from aggregator.rounds.report import Traffic
from protocol import topics
from protocol.codec import encode
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk, ModelAnnouncement, ToDevice


@dataclass(frozen=True)
class Outgoing:
    """A message that is sent once the transaction is durable."""

    topic: str
    payload: bytes
    retain: bool = False
    device_id: str = ""
    announces: tuple[str, str] | None = None
    """Model and device (empty: the fleet) that it tells what to have."""


class Work:
    """A transaction that begins when it is first needed, and an outbox.

    Example:
        with Work(repository, at) as work:
            work.writer.append_log(round_id, entry)
            work.send("barn-1", message)
        for outgoing in work.outbox:  # only now, and not at all after an exception
            transport.publish(outgoing.topic, outgoing.payload)
    """

    def __init__(self, repository: Repository, at: Moment) -> None:
        """Prepares a unit of work at the instant `at`."""
        self.at = at
        self.outbox: list[Outgoing] = []
        self._repository = repository
        self._writer: Writer | None = None
        self._stack = ExitStack()

    @property
    def writing(self) -> bool:
        """Whether the transaction has begun."""
        return self._writer is not None

    @property
    def writer(self) -> Writer:
        """The transaction; it is begun by the first use, so that idle work takes no lock."""
        if self._writer is None:
            self._writer = self._stack.enter_context(self._repository.write())
        return self._writer

    def send(self, device_id: str, message: ToDevice, body: bytes = b"") -> None:
        """Puts a message to a device into the outbox."""
        channel: topics.DownChannel = "chunk" if isinstance(message, BlobChunk) else "msg"
        payload = encode(message, body)
        self.outbox.append(Outgoing(topics.down(device_id, channel), payload, device_id=device_id))

    def announce(self, assigned: Assigned, version: Version | None) -> None:
        """Puts the retained announcement of what the fleet, or a device, is to have into the outbox."""
        message = ModelAnnouncement(
            assignment=SignedDocument.model_validate_json(assigned.document),
            manifest=None if version is None else document_of(version),
        )
        own = assigned.device_id
        topic = topics.own_model(own, assigned.model) if own else topics.model(assigned.model)
        announces = (assigned.model, own)
        self.outbox.append(Outgoing(topic, encode(message), retain=True, announces=announces))

    def __enter__(self) -> Self:
        """Opens the unit of work."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commits, or rolls back after an exception and forgets the outbox."""
        if error is not None:
            self.outbox.clear()
        try:
            self._stack.__exit__(kind, error, trace)
        except BaseException:
            self.outbox.clear()
            raise


class TrafficMeter:
    """Payload bytes of each device since its last round ended."""

    def __init__(self) -> None:
        """Starts at nothing."""
        self._up: dict[str, int] = {}
        self._down: dict[str, int] = {}

    def up(self, device_id: str, size: int) -> None:
        """Counts what a device sent."""
        self._up[device_id] = self._up.get(device_id, 0) + size

    def down(self, device_id: str, size: int) -> None:
        """Counts what was sent to a device."""
        self._down[device_id] = self._down.get(device_id, 0) + size

    def read(self, devices: frozenset[str]) -> Mapping[str, Traffic]:
        """The figures of these devices."""
        return {d: Traffic(up=self._up.get(d, 0), down=self._down.get(d, 0)) for d in sorted(devices)}

    def clear(self, devices: frozenset[str]) -> None:
        """Starts these devices at nothing again."""
        for device_id in devices:
            self._up.pop(device_id, None)
            self._down.pop(device_id, None)
