"""Runs rounds: hands messages to their round, and ends what is over; `aggregator.starting` begins them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from aggregator.buffering import Buffers
from aggregator.clock import Moment
from aggregator.ending import Finisher
from aggregator.fleet.authority import Authority
from aggregator.fleet.presence import Change, Presence
from aggregator.lost_rounds import give_up
from aggregator.records import Campaign, Round
from aggregator.repository import Reader, Repository, RepositoryError
from aggregator.rounds import machine
from aggregator.rounds.events import DeviceOffline, DeviceOnline, MessageReceived, Reconnected, Tick
from aggregator.rounds.report import RoundReport
from aggregator.rounds.subcohort_state import Trust
from aggregator.running import RunningRound
from aggregator.starting import Starter
from aggregator.unmasking import Unmasker
from aggregator.work import TrafficMeter, Work
from protocol.errors import IllegalEvent
from protocol.messages import BlobChunk, Refusal, RoundEnd, UploadOffer
from protocol.secagg.server import ClientMessage

logger = logging.getLogger(__name__)
REMEMBERED = 64
"""Ended rounds that a device is told of at its birth, in case it missed the end."""


class Conductor:
    """All rounds of one aggregator. It belongs to the main loop; nothing in it is shared.

    What it holds in memory follows from the repository (`load`), so that after a failed transaction, or a
    crash, it is simply loaded again.
    """

    def __init__(
        self,
        authority: Authority,
        finisher: Finisher,
        unmasker: Unmasker,
        presence: Presence,
        entropy: Callable[[], bytes],
    ) -> None:
        """Prepares a conductor that knows of no rounds yet.

        Args:
            entropy: returns 32 fresh random bytes, for round ids.
        """
        self.traffic = TrafficMeter()
        self.buffers = Buffers(authority)
        self._trust = Trust(authority.ca)
        self._starter = Starter(authority, self._trust, presence, self.buffers, entropy)
        self._finisher = finisher
        self._unmasker = unmasker
        self._presence = presence
        self._running: dict[str, RunningRound] = {}
        self._ended: OrderedDict[str, tuple[RoundEnd, frozenset[str]]] = OrderedDict()
        self._dropped: dict[str, tuple[str, str]] = {}
        self._lost: dict[str, tuple[Round, str]] = {}
        self._restored = False

    def load(self, repository: Repository, at: Moment) -> None:
        """Forgets everything and reads it again from the repository."""
        self._running.clear()
        self._ended.clear()
        self._dropped.clear()
        self._lost.clear()
        self.buffers.clear()
        self._unmasker.forget_all()
        with repository.read() as reader:
            for record in reader.rounds(last=REMEMBERED):
                if record.status != "running":
                    self._remember(record)
            for record in reader.rounds(status="running"):
                try:
                    running = RunningRound.load(reader, record, self._trust, at)
                except (RepositoryError, OSError):
                    raise
                except Exception as error:
                    # Of this round alone: it is given up, and the others go on.
                    logger.debug("round %s", record.round_id, exc_info=True)
                    self._lost[record.round_id] = (record, f"{type(error).__name__}: {error}")
                    continue
                self._running[record.round_id] = running
                logger.info("round %s resumed", record.round_id[:8])
        self._restored = True

    @property
    def active(self) -> bool:
        """Whether any round is running."""
        return bool(self._running)

    # --- campaigns

    def serve_campaigns(self, work: Work, campaigns: Sequence[Campaign]) -> None:
        """Starts the next round of every campaign whose turn it is."""
        self._starter.serve(work, campaigns, self._running)

    # --- messages

    def message(self, work: Work, device_id: str, message: ClientMessage | UploadOffer) -> None:
        """Takes in a device's message to a round.

        A message that the round does not want changes nothing. A device that has no part in the round, any
        more or at all, is told that it is over, so that it can forget it.
        """
        running = self._running.get(message.round_id)
        if running is None or running.state.ended:
            if running is None and not (
                isinstance(message, Refusal) and self.buffers.refused(work, device_id, message)
            ):
                self._tell_ended(work, device_id, message.round_id)
            return
        try:
            if isinstance(message, UploadOffer):
                running.offer(work, device_id, message)
            else:
                running.apply(work, MessageReceived(device_id, message))
        except IllegalEvent as error:
            logger.debug("round %s: %s from %s: %s", running.round_id[:8], message.type, device_id, error)
            if not machine.expects(running.state, device_id):
                end = RoundEnd(round_id=running.round_id, completed=False, reason="not-in-round")
                work.send(device_id, end)

    def chunk(self, work: Work, device_id: str, message: BlobChunk, body: memoryview) -> None:
        """Takes in a chunk; one that no round waits for is dropped."""
        for running in self._running.values():
            if running.receives(device_id, message.blob):
                running.chunk(work, device_id, message, body)
                return

    def presence_changed(self, work: Work, device_id: str, change: Change) -> None:
        """Takes in that a device is there, or gone."""
        self.buffers.device_changed(device_id)
        for running in self._running.values():
            if change is Change.BORN:
                running.apply(work, DeviceOnline(device_id))
            elif change is Change.GONE:
                running.apply(work, DeviceOffline(device_id))
        if change is Change.BORN:
            for end, invited in self._ended.values():
                if device_id in invited:
                    work.send(device_id, end)

    def reconnected(self, work: Work, outage: float) -> None:
        """Takes in that devices can be reached again."""
        self._starter.reconnected()
        for running in self._running.values():
            running.apply(work, Reconnected(outage))

    def tick(self, work: Work) -> None:
        """Lets time pass for every round."""
        if self._restored:
            self._restored = False
            for device_id in sorted(self._presence.online()):
                self.presence_changed(work, device_id, Change.BORN)
        for round_id, running in self._running.items():
            if running.state.ended or round_id in self._dropped:
                continue
            try:
                running.apply(work, Tick())
            except (RepositoryError, OSError):
                raise
            except Exception as error:
                # Of this round alone: the others, and the messages of this batch, must not suffer for it.
                logger.exception("round %s stumbled and is given up", round_id)
                self._dropped[round_id] = ("defect", type(error).__name__)

    def save_reports(self, work: Work) -> None:
        """Saves the report of every round that has changed, for whoever watches."""
        for running in self._running.values():
            if running.changed:
                report = RoundReport(
                    phases=running.state.phases(),
                    subcohorts=running.state.reports(),
                    survivors=running.state.survivors,
                    traffic=self.traffic.read(running.state.invited),
                    delta=running.encoding.privacy.delta,
                    buffer=running.buffer,
                )
                work.writer.save_report(running.round_id, report.to_bytes())
                running.changed = False

    # --- endings

    def drop_cancelled(self, reader: Reader) -> None:
        """Gives up the rounds whose campaign was cancelled, unless their privacy is spent already."""
        for round_id, running in self._running.items():
            if running.state.ended or running.state.spent or round_id in self._dropped:
                continue
            campaign = reader.campaign(running.record.campaign_id)
            if campaign is not None and campaign.status == "cancelled":
                self._dropped[round_id] = ("cancelled", "its campaign was cancelled")

    def over(self, repository: Repository) -> tuple[str, ...]:
        """The rounds that wait for `finish`; those that have just ended begin to be unmasked.

        Args:
            repository: in which everything is durable that the rounds have seen.
        """
        over = list(self._lost)
        for round_id, running in self._running.items():
            if round_id in self._dropped:
                over.append(round_id)
            elif running.state.ended:
                self._unmasker.begin(repository, running)
                if self._unmasker.ready(running):
                    over.append(round_id)
        return tuple(over)

    def finish(self, work: Work, round_id: str) -> None:
        """Ends a round that is over, in a transaction of its own."""
        if round_id in self._lost:
            give_up(work, *self._lost[round_id])
            return
        if round_id in self._dropped:
            self.abort(work, round_id, *self._dropped[round_id])
            return
        running = self._running[round_id]
        traffic = dict(self.traffic.read(running.state.invited))
        self._finisher.finish(work, running, self._unmasker.result(running), traffic)

    def abort(self, work: Work, round_id: str, code: str, detail: str) -> None:
        """Ends a round whose `finish` failed."""
        if round_id in self._lost:
            # Going on would forget what it spent: better no rounds than that.
            raise RuntimeError(f"round {round_id} can neither be restored nor given up: {code}: {detail}")
        running = self._running[round_id]
        traffic = dict(self.traffic.read(running.state.invited))
        self._finisher.abort(work, running, code, detail, traffic)

    def forget(self, reader: Reader, round_id: str) -> None:
        """Drops an ended round from memory, once its end is durable."""
        running = self._running.pop(round_id, None)
        if running is not None:
            self.traffic.clear(running.state.invited)
        self._unmasker.forget(round_id)
        self._dropped.pop(round_id, None)
        self._lost.pop(round_id, None)
        record = reader.round(round_id)
        if record is not None:
            self._remember(record)

    def _remember(self, record: Round) -> None:
        end = RoundEnd(round_id=record.round_id, completed=record.status == "completed", reason=record.code)
        self._ended[record.round_id] = (end, frozenset(record.invited))
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def _tell_ended(self, work: Work, device_id: str, round_id: str) -> None:
        known = self._ended.get(round_id)
        if known is None:
            record = work.writer.round(round_id)
            completed = record is not None and record.status == "completed"
            reason = "unknown-round" if record is None else record.code
            work.send(device_id, RoundEnd(round_id=round_id, completed=completed, reason=reason))
        else:
            work.send(device_id, known[0])
