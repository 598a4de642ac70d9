"""The loop of `covey-edge run`: takes events one at a time, and carries out what the core wants.

It holds no rules. Its one duty is the order: what is durable first, then what is sent, then the
acknowledgement to the broker; and when the disk refuses, nothing happened.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import assert_never

from edge_client.adapters.files import StorageError
from edge_client.adapters.mqtt import Inbound, LinkDown, LinkEvent, LinkUp, MqttLink, birth
from edge_client.adapters.notify import Notifier
from edge_client.adapters.own_client import OwnClient
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.tls import TlsFiles
from edge_client.adapters.uses import VersionUses
from edge_client.adapters.worker import Worker
from edge_client.durable import DURABLE
from edge_client.events import (
    ClientSeen,
    ConditionsChanged,
    Connected,
    Event,
    Fault,
    FieldsDeclared,
    MessageReceived,
    Stamp,
    Started,
    Ticked,
    VersionFailed,
    WorkFailed,
)
from edge_client.fields import InvalidFields
from edge_client.inbox import Inbox, Stop
from edge_client.library import download_limit
from edge_client.outputs import (
    Announce,
    Evaluate,
    FindBlob,
    HandOver,
    KeepBlobs,
    Level,
    MaskInput,
    Note,
    Output,
    Personalise,
    PrepareUpdate,
    ReadField,
    ReadUpdate,
    Send,
    SendChunks,
    TestVersion,
    Train,
)
from edge_client.profile import Profile
from edge_client.renewing import Renewer
from edge_client.session import handle
from edge_client.session_state import SessionState, restore
from edge_client.sources import DataSource
from edge_client.watch import Watch
from protocol import topics
from protocol.codec import decode_to_device, encode
from protocol.conditions import Conditions
from protocol.errors import MalformedMessage, ProtocolError
from protocol.messages import BlobNeed, DeviceStatus, ModelAnnouncement, RenewalAnswer, VersionFailure
from protocol.transfer import chunks

TICK_SECONDS = 0.25
IDLE_TICK_SECONDS = 1.0
CONDITIONS_SECONDS = 10.0
STORAGE_PAUSE_SECONDS = 5.0

_LOG = logging.getLogger("covey.edge")


class Daemon:
    """One device's process."""

    def __init__(
        self,
        profile: Profile,
        store: DeviceStore,
        link: MqttLink,
        worker: Worker,
        data: DataSource,
        fields: FieldReader,
        inbox: Inbox,
        *,
        client_version: str,
        runtime: str,
        max_download_rate: float | None = None,
        uses: VersionUses | None = None,
        watch: Watch | None = None,
        notifier: Notifier | None = None,
        renewer: Renewer | None = None,
        tls: TlsFiles | None = None,
        own: OwnClient | None = None,
        unix: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Puts the parts together; `run` starts them.

        Args:
            max_download_rate: bytes of models a second, on average; no limit when None.
            uses: what failed in other processes of this device, or killed them; nobody looks when None.
            watch: of the device's surroundings; without one it may always train, and says nothing of them.
            notifier: of the service manager; by default the one that started this process.
            renewer: of this device's certificate; it is not renewed without one.
            tls: the files that the link uses, whose content a renewal replaces.
            own: the client as it is installed; it is not updated without one.
        """
        self._uses = uses
        self._profile, self._store, self._link = profile, store, link
        self._worker, self._data, self._fields, self._inbox = worker, data, fields, inbox
        self._client_version, self._runtime = client_version, runtime
        self._unix, self._steady, self._watch = unix, steady, watch
        limit = None if max_download_rate is None else download_limit(max_download_rate, steady())
        self._state: SessionState = restore(store.load(), limit)
        self._session = bytes(32)
        self._notifier = notifier or Notifier()
        self._renewer, self._tls, self._own = renewer, tls, own
        self._connected = False
        self._postponed: list[tuple[float, Event]] = []
        self._fields_unusable = False
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Runs until `Stop` comes; leaves an offline status behind."""
        active = self._state.active
        self._store.blobs.keep_upload(active.round_id if active else None)
        self._store.keep_local()
        self._store.keep_pending()
        self._worker.start()
        self._data.start()
        # Before anything is taken up again: what crashed the last process must not crash this one.
        self._take_failures()
        self._check_conditions()
        # Before downloads that nobody wants any more are deleted.
        self._look_at_client()
        self._take(Started())
        self._link.start()
        self._notifier.ready()
        next_tick = next_check = self._steady()
        try:
            while True:
                now = self._steady()
                item = self._inbox.get(next_tick - now)
                if isinstance(item, Stop):
                    return
                if item is not None:
                    self._take(item)
                now = self._steady()
                if now >= next_tick:
                    next_tick = now + self._tick(now)
                if now >= next_check:
                    next_check = now + CONDITIONS_SECONDS
                    self._take_failures()
                    self._check_conditions()
                    self._look_at_client()
                    self._renew()
                    self._notifier.alive()
                    self._notifier.status(self._summary())
        finally:
            self._notifier.stopping()
            self._link.stop(self._status(online=False))
            self._worker.stop()
            self._data.stop()

    # --- in ----------------------------------------------------------------------------------------------

    def _take(self, item: LinkEvent | Event) -> None:
        if isinstance(item, Inbound):
            self._receive(item)
        elif isinstance(item, LinkUp):
            self._session = item.session
            self._connected = True
            _LOG.info("connected mqtt=%s", item.version)
            self._handle(Connected())
        elif isinstance(item, LinkDown):
            self._connected = False
            _LOG.info("connection-lost reason=%r", item.reason)
        elif not self._handle(item):
            # Results of this device's own work come once: they wait until the disk takes them.
            self._postponed.append((self._steady() + STORAGE_PAUSE_SECONDS, item))

    def _receive(self, inbound: Inbound) -> None:
        try:
            message, body = decode_to_device(inbound.frame)
            if inbound.topic.startswith(f"{topics.ROOT}/bcast/") and not isinstance(
                message, ModelAnnouncement
            ):
                raise MalformedMessage(f"a {message.type} on a broadcast topic")
        except MalformedMessage as error:
            self.counts["malformed"] += 1
            _LOG.warning(
                "malformed topic=%s count=%d reason=%r", inbound.topic, self.counts["malformed"], str(error)
            )
        else:
            self.counts[message.type] += 1
            if isinstance(message, RenewalAnswer):
                if self._renewer is not None:
                    self._renewer.take(message, self._unix(), self._steady())
            else:
                self._handle(MessageReceived(message, body))
        # Also when the disk refused it: the aggregator repeats its requests, and a message that is held back
        # would stop the broker's window.
        inbound.acknowledge()

    def _tick(self, now: float) -> float:
        """Lets the core see the time; returns the seconds until it wants to see it again."""
        due = [event for at, event in self._postponed if at <= now]
        self._postponed = [(at, event) for at, event in self._postponed if at > now]
        for event in due:
            self._take(event)
        if not self._handle(Ticked()):
            return STORAGE_PAUSE_SECONDS
        return TICK_SECONDS if self._state.busy else IDLE_TICK_SECONDS

    def _take_failures(self) -> None:
        """Takes in which versions failed in `predict` or `personalise`, or crashed a process."""
        try:
            failures = self._uses.found() if self._uses is not None else ()
        except StorageError as error:
            _LOG.warning("storage-error reason=%r", str(error))
            return
        for failure in failures:
            if self._uses is not None and self._handle(VersionFailed(failure.sha256, failure.fault)):
                self._uses.forget(failure)

    def _check_conditions(self) -> None:
        fault = self._data.fault()
        if self._watch is not None:
            broken = self._watch.look(training=self._worker.training, examples=self._worker.example_count)
            fault = fault or broken
            if self._watch.news(self._steady()):
                self._publish_status(self._state.library.serving(), self._state.library.failures())
        if fault != self._state.unfit:
            if fault is None:
                _LOG.info("can-train")
            elif self._state.unfit is None or fault.code != self._state.unfit.code:
                _LOG.warning("cannot-train code=%s detail=%r", fault.code, fault.detail)
            self._handle(ConditionsChanged(fault))
        fields = self._declared()
        if fields != self._state.fields:
            _LOG.info("fields-declared count=%d", len(fields))
            self._handle(FieldsDeclared(fields))

    def _look_at_client(self) -> None:
        """Takes in what is installed, when that has changed."""
        sight = None if self._own is None else self._own.look()
        if sight == self._state.client.sight:
            return
        if self._own is not None and sight is not None and not sight.waits:
            self._own.tidy()
        self._handle(ClientSeen(sight))

    def _renew(self) -> None:
        """Asks for a new certificate when one is due, and goes over to it while no round runs."""
        if self._renewer is None:
            return
        if self._connected and (asked := self._renewer.due(self._unix(), self._steady())) is not None:
            self._link.send("msg", encode(asked))
        if self._state.active is None and (new := self._renewer.change(self._steady())) is not None:
            self._profile = replace(self._profile, certificate=new.bundle.certificate, identity=new.identity)
            if self._tls is not None:
                self._link.use(self._tls)

    def _declared(self) -> frozenset[str]:
        try:
            fields = self._fields.declared()
        except (InvalidFields, StorageError) as error:
            if not self._fields_unusable:
                _LOG.warning("fields-unusable reason=%r", str(error))
            self._fields_unusable = True
            return frozenset()
        self._fields_unusable = False
        return fields

    def _handle(self, event: Event) -> bool:
        """Applies an event and everything that follows at once; returns False when the disk refused it."""
        waiting: deque[Event] = deque([event])
        first = True
        while waiting:
            following = self._apply(waiting.popleft())
            if following is None and first:
                return False
            waiting.extend(following or ())
            first = False
        return True

    def _apply(self, event: Event) -> list[Event] | None:
        stamp = Stamp(int(self._unix()), self._steady(), os.urandom(32))
        try:
            state, outputs = handle(self._profile, self._state, event, stamp)
        except Exception:
            # A defect must not let one message stop the device for good: the state is as it was before.
            self.counts["rejected"] += 1
            _LOG.exception("event-rejected event=%s", type(event).__name__)
            return []
        try:
            self._store.apply([output for output in outputs if isinstance(output, DURABLE)])
        except StorageError as error:
            self.counts["storage-error"] += 1
            _LOG.error("storage-error event=%s reason=%r", type(event).__name__, str(error))
            return None
        self._state = state
        following: list[Event] = []
        for output in outputs:
            if not isinstance(output, DURABLE):
                following.extend(self._carry_out(output))
        return following

    # --- out ---------------------------------------------------------------------------------------------

    def _carry_out(self, output: Output) -> list[Event]:
        if isinstance(output, Send):
            channel: topics.UpChannel = "msg"
            self._link.send(channel, encode(output.message))
        elif isinstance(output, SendChunks):
            return self._send_chunks(output.round_id, output.need)
        elif isinstance(output, Announce):
            self._publish_status(output.models, output.failures)
        elif isinstance(output, FindBlob):
            return self._find(output)
        elif isinstance(output, KeepBlobs):
            self._collect(output.digests)
        elif isinstance(output, HandOver):
            return self._hand_over(output)
        elif isinstance(
            output,
            TestVersion | Train | PrepareUpdate | ReadUpdate | Evaluate | ReadField | MaskInput | Personalise,
        ):
            self._worker.submit(output)
        elif isinstance(output, Note):
            log(output)
        elif not isinstance(output, DURABLE):
            assert_never(output)
        return []

    def _send_chunks(self, round_id: str, need: BlobNeed) -> list[Event]:
        try:
            with self._store.blobs.upload(round_id) as view:
                for chunk, body in chunks(need.blob, view, need.indices):
                    with body:
                        self._link.send("chunk", encode(chunk, body))
        except (StorageError, ProtocolError) as error:
            return [WorkFailed(round_id, Fault("upload-lost", str(error)))]
        return []

    def _hand_over(self, output: HandOver) -> list[Event]:
        if self._own is None:
            return []
        try:
            self._own.hand_over(self._store.blobs, output)
        except StorageError as error:
            # Handed over again, later.
            _LOG.error("storage-error event=HandOver reason=%r", str(error))
        return [ClientSeen(self._own.look())]

    def _publish_status(self, models: Mapping[str, int], failures: Mapping[str, VersionFailure]) -> None:
        conditions = Conditions() if self._watch is None else self._watch.tell(self._steady())
        client = self._state.client
        frame = birth(
            self._session,
            {**models, **client.serving},
            self._client_version,
            self._runtime,
            target="" if client.sight is None else client.sight.target,
            failures={**failures, **client.failures},
            conditions=conditions,
        )
        self._link.send("status", frame, retain=True)

    def _summary(self) -> str:
        """What `systemctl status` shows."""
        active, unfit = self._state.active, self._state.unfit
        doing = f"in round {active.round_id[:8]}" if active is not None else "waiting for a round"
        parts = ["connected" if self._connected else "no broker: going on without", doing]
        return "; ".join(parts if unfit is None else [*parts, f"cannot train: {unfit.detail}"])

    def _status(self, *, online: bool) -> DeviceStatus:
        return DeviceStatus(
            session=self._session,
            online=online,
            client_version=self._client_version,
            runtime=self._runtime,
            models=self._state.library.serving(),
            failures=self._state.library.failures(),
        )

    def _find(self, output: FindBlob) -> list[Event]:
        try:
            return [self._store.blobs.find(output.blob)]
        except StorageError as error:
            # Asked again by the timer of the download.
            _LOG.error("storage-error blob=%s reason=%r", output.blob.sha256[:16], str(error))
            return []

    def _collect(self, digests: frozenset[str]) -> None:
        try:
            self._store.blobs.keep(digests)
        except StorageError as error:
            _LOG.warning("storage-error reason=%r", str(error))


def log(output: Note) -> None:
    """Writes a note as `event key=value ...`."""
    fields = "".join(f" {key}={_value(value)}" for key, value in output.fields.items())
    level = logging.WARNING if output.level is Level.WARNING else logging.INFO
    _LOG.log(level, "%s%s", output.event, fields)


def _value(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
