"""Runs rounds: starts what campaigns ask for, hands messages to their round, and ends what is over."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from structlog.contextvars import bound_contextvars

from aggregator.buffering import Buffers
from aggregator.clock import Moment
from aggregator.ending import Finisher
from aggregator.fleet.authority import Authority
from aggregator.fleet.presence import Change, Presence
from aggregator.gathering import Gathering, gather, selection
from aggregator.lost_rounds import give_up
from aggregator.records import Campaign, NoiseTree, Round, Version
from aggregator.registry.publishing import manifest_of
from aggregator.repository import Reader, Repository, RepositoryError
from aggregator.rounds import machine
from aggregator.rounds.clipping import adapted
from aggregator.rounds.events import DeviceOffline, DeviceOnline, MessageReceived, Reconnected, Tick
from aggregator.rounds.noise_tree import placed
from aggregator.rounds.planning import (
    CampaignSettings,
    VersionToEvaluate,
    asked_by,
    assign,
    make_plan,
    readable,
)
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selection import places, ready
from aggregator.rounds.subcohort_state import Trust
from aggregator.running import LostBase, RunningRound
from aggregator.spending import BudgetRefused, check_limit, spent_events
from aggregator.unmasking import Unmasker
from aggregator.work import TrafficMeter, Work
from models.assignment import described
from models.manifest import ModelManifest
from protocol.dp.events import event_for
from protocol.errors import IllegalEvent, ProtocolError
from protocol.messages import BlobChunk, Refusal, RoundEnd, UploadOffer
from protocol.plan import TrainingParameters, TrainTask
from protocol.round_encoding import round_encoding
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
        self._authority = authority
        self._trust = Trust(authority.ca)
        self._finisher = finisher
        self._unmasker = unmasker
        self._presence = presence
        self._entropy = entropy
        self._running: dict[str, RunningRound] = {}
        self._ended: OrderedDict[str, tuple[RoundEnd, frozenset[str]]] = OrderedDict()
        self._patience: dict[str, float] = {}
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
        self._patience.clear()
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

    # --- campaigns

    def serve_campaigns(self, work: Work, campaigns: Sequence[Campaign]) -> None:
        """Starts the next round of every campaign whose turn it is.

        A model is trained by one campaign at a time, because each round goes on from the version of the one
        before; one that waits for its time lets others go. Evaluations of a model are one at a time beside
        that, and so are queries. A device is in one round only. Queries and evaluations go first, or the
        rounds of a long campaign would leave them no devices until its end.
        """
        running = {each.record.campaign_id for each in self._running.values()}
        busy = {_lane(each.record.model, each.state.plan.task) for each in self._running.values()}
        lanes = [(_lane(campaign.model, asked_by(campaign)), campaign) for campaign in campaigns]
        for lane, campaign in sorted(lanes, key=lambda each: each[0].trains):
            if lane in busy:
                if campaign.campaign_id in running and campaign.started < campaign.rounds:
                    self._keep_training(work, campaign)
                continue
            if campaign.started >= campaign.rounds:
                if not _wanted(work, campaign):
                    continue
                work.writer.update_campaign(campaign.campaign_id, "finished")
                work.writer.fell_noise_tree(campaign.campaign_id)
                work.writer.forget_optimizer_memory(campaign.campaign_id)
                self._patience.pop(campaign.campaign_id, None)
                logger.info("campaign %s finished", campaign.campaign_id[:8])
                continue
            if campaign.due_at is not None and work.at.unix < campaign.due_at:
                # Others may use the time: each round goes on from the newest version there is.
                continue
            busy.add(lane)
            try:
                self._serve(work, campaign)
            except (BudgetRefused, ProtocolError, LostBase, ValueError) as error:
                if not _wanted(work, campaign):
                    continue
                work.writer.update_campaign(campaign.campaign_id, "failed", str(error)[:300])
                work.writer.fell_noise_tree(campaign.campaign_id)
                work.writer.forget_optimizer_memory(campaign.campaign_id)
                logger.error("campaign %s failed: %s", campaign.campaign_id[:8], error)

    def _keep_training(self, work: Work, campaign: Campaign) -> None:
        """Lets devices train while a buffer of the same campaign is collected."""
        settings = readable(campaign)
        if settings is not None and settings.buffered and campaign.status == "running":
            version = self._version(work, campaign.model, settings)
            self.buffers.ask(work, campaign, settings, version, self._idle(campaign))

    def _waiting(
        self, work: Work, campaign: Campaign, settings: CampaignSettings, idle: frozenset[str]
    ) -> frozenset[str]:
        """The idle devices whose updates wait for a buffer; the others are asked to train."""
        version = self._version(work, campaign.model, settings)
        self.buffers.ask(work, campaign, settings, version, idle)
        return idle & self.buffers.waiting(campaign.campaign_id, version.version, settings.maximum_staleness)

    def _idle(self, campaign: Campaign) -> frozenset[str]:
        """The devices that are online and in no round.

        Whoever was in a round of the campaign is told of its end first: a buffer's devices are to train from
        the version that comes of it.
        """
        return self._presence.online() - {
            device_id
            for running in self._running.values()
            for device_id in running.state.invited
            if running.record.campaign_id == campaign.campaign_id or machine.expects(running.state, device_id)
        }

    def _serve(self, work: Work, campaign: Campaign) -> None:
        settings = placed(
            CampaignSettings.from_bytes(campaign.settings), campaign.campaign_id, campaign.started + 1
        )
        online = self._idle(campaign)
        size = places(settings.cohort.size, settings.over_select)
        if settings.buffered:
            # A buffer is collected when it is full, and then at once.
            size = minimum = settings.cohort.size
            candidates = self._waiting(work, campaign, settings, online)
            short = f"waiting for updates: {{count}} of {minimum} ready"
        else:
            minimum = settings.cohort.minimum * settings.cohort.split.count
            candidates = online
            short = f"waiting for devices: {{count}} of at least {minimum} {{who}}"
        found = Gathering((), "online")
        if len(candidates) >= minimum:
            found = gather(work.writer, campaign, settings, candidates)
        available = found.pool
        if len(available) < minimum:
            self._patience.pop(campaign.campaign_id, None)
            count = len(available) if len(candidates) >= minimum else len(candidates)
            why = self.buffers.why_refused(campaign.campaign_id) if settings.buffered else ""
            note = "; ".join(filter(None, (short.format(count=count, who=found.who), why)))[:300]
            if campaign.note != note and _wanted(work, campaign):
                work.writer.update_campaign(campaign.campaign_id, campaign.status, note)
            return
        since = self._patience.setdefault(campaign.campaign_id, work.at.clock)
        if not ready(
            len(available),
            minimum=minimum,
            size=size,
            waited=work.at.clock - since,
            patience=settings.gather_seconds,
        ):
            return
        del self._patience[campaign.campaign_id]
        if not _wanted(work, campaign):
            return
        self._start(work, campaign, settings, available)

    def _start(
        self, work: Work, campaign: Campaign, settings: CampaignSettings, pool: tuple[str, ...]
    ) -> None:
        base = self._base(work, campaign.model, settings)
        assignment = assign(settings, base, order=campaign.campaign_id)
        last = work.writer.rounds(campaign_id=campaign.campaign_id, last=1)
        settings = adapted(settings, last[0] if last else None)
        round_id = self._entropy()[:16].hex()
        plan = make_plan(settings, self._authority.fleet, round_id, assignment.task, work.at)
        document = self._authority.sign_plan(plan)
        if settings.epsilon_limit is not None:
            encoding = round_encoding(plan, document.digest, assignment.dimension)
            # A round that is running has not spent yet, but it will: at most this.
            reserved = [
                event_for(running.encoding, running.encoding.minimum_survivors)
                for running in self._running.values()
            ]
            check_limit([*spent_events(work.writer), *reserved], encoding, settings.epsilon_limit)
        number = campaign.started + 1
        drawn = selection(work.writer, campaign, settings, pool, number)
        record = Round(
            round_id=round_id,
            campaign_id=campaign.campaign_id,
            number=number,
            model=campaign.model,
            base_version=None if base is None else base.version,
            plan=document.model_dump_json().encode(),
            selection_seed=drawn.seed,
            invited=drawn.chosen,
            started_at=work.at.unix,
        )
        tree = settings.privacy.tree
        known = work.writer.noise_tree(campaign.campaign_id)
        if tree is not None and (known is None or known.tree != tree.tree):
            work.writer.plant_noise_tree(NoiseTree(campaign.campaign_id, tree.tree, self._entropy()))
        self._running[round_id] = RunningRound.begin(work, record, drawn, assignment, self._trust)
        if settings.buffered:
            self.buffers.collected(campaign.campaign_id, drawn.chosen)
        if settings.schedule is not None:
            # From now, not from the firing that this round serves: what was missed is not made up for.
            work.writer.set_due(campaign.campaign_id, settings.schedule.after(work.at.unix))
        with bound_contextvars(round=round_id, campaign=campaign.campaign_id):
            logger.info(
                "round %s (%d of %d) started: %s, %d devices",
                round_id[:8],
                number,
                campaign.rounds,
                described(assignment.task),
                len(record.invited),
            )

    def _base(self, work: Work, model: str | None, settings: CampaignSettings) -> ModelManifest | None:
        """The version that a campaign's next round is about; None for a query."""
        return None if model is None else manifest_of(self._version(work, model, settings))

    def _version(self, work: Work, model: str | None, settings: CampaignSettings) -> Version:
        if model is None:
            raise LostBase("a query is about no version")
        if isinstance(settings.asks, VersionToEvaluate):
            version = work.writer.version(model, settings.asks.version)
        else:
            # Rounds build on each other before anybody promotes what comes of them.
            version = work.writer.newest_version(model, "candidate", "canary", "stable")
        if version is None:
            raise LostBase(f"{model} has no such version: publish one with `covey model publish`")
        return version


def _wanted(work: Work, campaign: Campaign) -> bool:
    """Whether a campaign is still to go on: it may have been paused or cancelled since it was read."""
    now = work.writer.campaign(campaign.campaign_id)
    return now is not None and now.status in ("waiting", "running")


@dataclass(frozen=True)
class _Lane:
    """What one campaign at a time works on: training of a model, evaluations of it, or queries."""

    model: str | None
    trains: bool


def _lane(model: str | None, asks: object) -> _Lane:
    return _Lane(model, isinstance(asks, TrainingParameters | TrainTask))
