"""The main loop: batches of messages in, one transaction, messages out.

Everything is at least once. A delivery is acknowledged to the broker after the transaction that accounts
for it; what is sent follows from durable state and is sent again until it is answered. When storage fails,
what is in memory is thrown away and loaded again, and the broker is asked for the same deliveries once more.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from structlog.contextvars import bound_contextvars

from aggregator.assigning import Assigner, Promotion
from aggregator.clock import Clock, Moment
from aggregator.conductor import Conductor
from aggregator.doorkeeper import Doorkeeper
from aggregator.downloads import DEFAULT_LIMITS, DownloadLimits, Downloads
from aggregator.ending import Finisher
from aggregator.fleet.access import RESPONSES
from aggregator.fleet.authority import Authority
from aggregator.fleet.presence import Change, Presence
from aggregator.records import Campaign
from aggregator.registry.artefacts import ArtefactStore, StoreUnavailable
from aggregator.renewals import Renewals
from aggregator.repository import Repository, RepositoryError, StorageUnavailable, Superseded
from aggregator.retention import DEFAULT_RETENTION, Keeper, Retention
from aggregator.revoked_list import RevokedList
from aggregator.rounds.release import Unmask
from aggregator.transport import Connected, Delivery, Disconnected, Inbound, Transport
from aggregator.unmasking import Unmasker
from aggregator.work import Outgoing, Work
from protocol import topics
from protocol.codec import decode_from_device
from protocol.errors import ProtocolError
from protocol.messages import BlobChunk, BlobNeed, DeviceStatus, FromDevice, RenewalRequest, UpdateReady
from protocol.secagg.masking import apply_masks

logger = logging.getLogger(__name__)

BATCH = 256
TICK_SECONDS = 0.2
PAUSE_SECONDS = 1.0
STORE_PAUSE_SECONDS = 5.0
MEMBERS_SECONDS = 1.0
"""How long after a device was revoked the broker is told, at most."""


def _entropy() -> bytes:
    return secrets.token_bytes(32)


class Service:
    """One aggregator: repository, artefacts and keys on one side, the broker on the other.

    Attributes:
        trouble: why it cannot do all of its work at the moment; empty when it can. Other threads may read it.
    """

    def __init__(
        self,
        repository: Repository,
        store: ArtefactStore,
        authority: Authority,
        transport: Transport,
        clock: Clock,
        entropy: Callable[[], bytes] = _entropy,
        unmask: Unmask = apply_masks,
        beside: Executor | None = None,
        promotion: Promotion = Promotion.AUTO,
        doorkeeper: Doorkeeper | None = None,
        revoked_list: RevokedList | None = None,
        renewals: Renewals | None = None,
        downloads: DownloadLimits = DEFAULT_LIMITS,
        retention: Retention = DEFAULT_RETENTION,
    ) -> None:
        """Prepares the service; `run` starts it.

        Args:
            entropy: returns 32 fresh random bytes.
            unmask: takes masks off a sum.
            beside: runs what would keep the main loop from its messages, on a single thread; by default that
                is done at once.
            promotion: what becomes of a new version by itself.
            doorkeeper: keeps the broker's access; None where that is done elsewhere.
            revoked_list: keeps the broker's list of revoked certificates; None likewise.
            renewals: answers devices that ask for a new certificate; without it, they get none.
            downloads: how fast models go out.
            retention: what is kept, and how long.
        """
        self.trouble = ""
        self._repository = repository
        self._transport = transport
        self._clock = clock
        self._presence = Presence()
        unmasker = Unmasker(entropy, unmask, beside)
        self._conductor = Conductor(authority, Finisher(store, authority), unmasker, self._presence, entropy)
        self._downloads = Downloads(store, downloads)
        self._keeper = Keeper(store, retention)
        self._assigner = Assigner(authority, clock, promotion)
        self._doorkeeper, self._revoked_list, self._renewals = doorkeeper, revoked_list, renewals
        self._members: frozenset[str] = frozenset()
        self._members_at = float("-inf")
        self._loaded = False
        self._connected = False
        self._outage_since: float | None = None
        self._polled = -TICK_SECONDS
        self._turned = float("-inf")
        self._store_again = 0.0

    @property
    def connected(self) -> bool:
        """Whether the broker is there; any thread may ask."""
        return self._connected

    @property
    def turned(self) -> float:
        """When the loop last went round, on the monotonic clock; any thread may ask."""
        return self._turned

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop` is set.

        Raises:
            Superseded: another service has taken over the database.
        """
        while not stop.is_set():
            try:
                self.step(TICK_SECONDS / 2)
            except Superseded:
                raise
            except (RepositoryError, OSError) as error:
                logger.error("storage fails, trying again: %s", error)
                self.trouble = str(error)
                self._recover(stop)
            except Exception:
                # Rounds must outlive a defect: what is durable is right, so it is loaded and tried again.
                logger.exception("the service stumbled, trying again")
                self.trouble = "a defect: see the log"
                self._recover(stop)

    def _recover(self, stop: threading.Event) -> None:
        self._loaded = False
        # What was not acknowledged comes again with a new connection.
        self._transport.reset()
        stop.wait(PAUSE_SECONDS)

    def step(self, timeout: float) -> None:
        """Serves one batch: what has come, what is due, what has ended.

        Raises:
            RepositoryError, OSError: storage failed; the next step loads everything again.
        """
        batch = self._transport.receive(BATCH, timeout)
        at = self._clock.moment()
        if not self._loaded:
            self._conductor.load(self._repository, at)
            self._assigner.reconnected()
            self._loaded = True
            # What was lost must be in the ledger before the next round asks it.
            self._end_rounds(at)
        try:
            self._serve(batch, at)
        except (RepositoryError, OSError):
            self._loaded = False
            raise
        except Exception:
            self._loaded = False
            logger.exception("a batch of %d messages failed; serving them one by one", len(batch))
            self._serve_one_by_one(batch, at)
        self._end_rounds(self._clock.moment())
        self._tidy(at)
        self._turned = at.clock

    # --- batches

    def _serve(self, batch: Sequence[Inbound], at: Moment) -> None:
        with Work(self._repository, at) as work:
            for inbound in batch:
                self._take(work, inbound)
            if self._connected and at.clock - self._polled >= TICK_SECONDS:
                self._polled = at.clock
                self._poll(work)
            self._conductor.save_reports(work)
        for inbound in batch:
            if isinstance(inbound, Delivery):
                self._transport.acknowledge(inbound)
        self._flush(work)

    def _serve_one_by_one(self, batch: Sequence[Inbound], at: Moment) -> None:
        """Finds the message that cannot be handled and drops it, so that it does not come again for ever."""
        for inbound in batch:
            if not self._loaded:
                self._conductor.load(self._repository, at)
                self._loaded = True
            try:
                self._serve([inbound], at)
            except (RepositoryError, OSError):
                self._loaded = False
                raise
            except Exception:
                self._loaded = False
                if isinstance(inbound, Delivery):
                    logger.exception("dropped a message on %s", inbound.topic)
                    self._transport.acknowledge(inbound)

    def _flush(self, work: Work) -> None:
        for outgoing in work.outbox:
            if self._transport.publish(outgoing.topic, outgoing.payload, retain=outgoing.retain):
                self._conductor.traffic.down(outgoing.device_id, len(outgoing.payload))
            elif outgoing.announces is not None:
                self._assigner.unsent(*outgoing.announces)

    def _take(self, work: Work, inbound: Inbound) -> None:
        if isinstance(inbound, Delivery):
            self._deliver(work, inbound)
        elif isinstance(inbound, Connected):
            clock = work.at.clock
            outage = 0.0 if self._outage_since is None else clock - self._outage_since
            self._connected, self._outage_since = True, None
            self._presence.reset()
            self._assigner.reconnected()
            self._conductor.reconnected(work, outage)
            if self._doorkeeper is not None:
                self._doorkeeper.connected()
            logger.info("connected to the broker")
        elif isinstance(inbound, Disconnected) and self._connected:
            self._connected, self._outage_since = False, work.at.clock
            logger.warning("the connection to the broker is lost")
            if self._doorkeeper is not None:
                self._doorkeeper.disconnected()

    def _deliver(self, work: Work, delivery: Delivery) -> None:
        if delivery.topic == RESPONSES:
            if self._doorkeeper is not None:
                work.outbox += self._doorkeeper.heard(delivery.payload, self._members, work.at.clock)
            return
        place = topics.parse_up(delivery.topic)
        if place is None:
            return
        device_id, channel = place
        if not delivery.payload:
            return  # something retained was cleared
        with bound_contextvars(device=device_id):
            if not self._may_speak(work, device_id):
                return
            try:
                message, body = decode_from_device(delivery.payload)
                if channel != _channel(message):
                    raise ProtocolError(f"a {message.type} on the channel {channel}")
                self._conductor.traffic.up(device_id, len(delivery.payload))
                self._dispatch(work, device_id, message, body)
            except ProtocolError as error:
                logger.warning("dropped a message of %s: %s", device_id, error)

    def _may_speak(self, work: Work, device_id: str) -> bool:
        state = work.writer.device_state(device_id)
        if state is None:
            logger.warning("a message of %s, which is not enrolled", device_id)
            return False
        if state != "active":
            logger.warning("a message of %s, which is %s", device_id, state)
            self._see_off(work, device_id)
        return state == "active"

    def _see_off(self, work: Work, device_id: str) -> None:
        """Takes in that a device is not of the fleet any more: no round waits for it."""
        if device_id in self._presence.online():
            gone = DeviceStatus(session=bytes(32), online=False, models={})
            work.writer.note_status(device_id, gone, work.at.unix)
            self._conductor.presence_changed(work, device_id, Change.GONE)
        self._presence.forget(device_id)
        # Whatever it left at the broker would come again with every connection; a birth need not be all.
        for channel in topics.UP_CHANNELS:
            work.outbox.append(Outgoing(topics.up(device_id, channel), b"", retain=True))

    def _dispatch(self, work: Work, device_id: str, message: FromDevice, body: memoryview) -> None:
        if isinstance(message, DeviceStatus):
            change = self._presence.status(device_id, message, work.at.clock)
            if change is not Change.NOTHING:
                work.writer.note_status(device_id, message, work.at.unix)
                self._conductor.presence_changed(work, device_id, change)
            return
        if self._presence.heard(device_id, work.at.clock) is Change.BORN:
            self._conductor.presence_changed(work, device_id, Change.BORN)
        if isinstance(message, BlobNeed):
            if not self._transport.busy():
                self._downloads.answer(work, work.writer, device_id, message)
        elif isinstance(message, RenewalRequest):
            device = work.writer.device(device_id)
            if self._renewals is not None and device is not None:
                work.send(device_id, self._renewals.answer(work.writer, device, message, work.at))
        elif isinstance(message, BlobChunk):
            self._conductor.chunk(work, device_id, message, body)
        elif isinstance(message, UpdateReady):
            self._conductor.buffers.update_ready(work, device_id, message)
        else:
            with bound_contextvars(round=message.round_id):
                self._conductor.message(work, device_id, message)

    # --- what is due

    def _poll(self, work: Work) -> None:
        self._conductor.tick(work)
        self._keep_members(work)
        campaigns: tuple[Campaign, ...]
        with self._repository.read() as reader:
            campaigns = reader.campaigns("waiting", "running")
            self._conductor.drop_cancelled(reader)
            self._conductor.buffers.end_others(work, reader)
        self._assigner.tick(work, self._repository)
        if campaigns:
            self._conductor.serve_campaigns(work, campaigns)

    def _keep_members(self, work: Work) -> None:
        clock = work.at.clock
        if clock >= self._members_at:
            self._members_at = clock + MEMBERS_SECONDS
            with self._repository.read() as reader:
                before, self._members = self._members, reader.active_devices()
                revoked = reader.certificates(revoked=True) if self._revoked_list is not None else ()
            for device_id in sorted((self._presence.online() | before) - self._members):
                logger.info("%s is not of the fleet any more", device_id)
                self._see_off(work, device_id)
            if self._revoked_list is not None and self._doorkeeper is not None:
                self._doorkeeper.send_away(self._revoked_list.tick(revoked, self._members, clock))
        if self._doorkeeper is not None:
            work.outbox += self._doorkeeper.tick(self._members, clock)

    def _tidy(self, at: Moment) -> None:
        try:
            self._keeper.tick(self._repository, at)
        except StoreUnavailable as error:
            logger.error("old artefacts stay for now: %s", error)

    def _end_rounds(self, at: Moment) -> None:
        # What is to be loaded again may have seen messages that are not durable.
        if not self._loaded or at.clock < self._store_again:
            return
        for round_id in self._conductor.over(self._repository):
            with bound_contextvars(round=round_id):
                if not self._end_round(round_id, at):
                    return
        self.trouble = ""

    def _end_round(self, round_id: str, at: Moment) -> bool:
        """Ends one round; returns False when it has to wait for the artefact store."""
        work = Work(self._repository, at)
        try:
            with work:
                self._conductor.finish(work, round_id)
        except StoreUnavailable as error:
            # Of this round alone, which waits: nothing of it is lost, and the others go on.
            logger.error("round %s waits for the artefact store: %s", round_id[:8], error)
            self.trouble = str(error)
            self._store_again = at.clock + STORE_PAUSE_SECONDS
            return False
        except (StorageUnavailable, Superseded, OSError):
            self._loaded = False
            raise
        except Exception as error:
            logger.exception("round %s cannot be released", round_id)
            work = Work(self._repository, at)
            with work:
                self._conductor.abort(work, round_id, "release-failed", type(error).__name__)
        with self._repository.read() as reader:
            self._conductor.forget(reader, round_id)
        self._flush(work)
        return True


def _channel(message: FromDevice) -> topics.UpChannel:
    if isinstance(message, DeviceStatus):
        return "status"
    return "chunk" if isinstance(message, BlobChunk) else "msg"
