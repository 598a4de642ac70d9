"""Starts rounds: whose turn it is, who is there for it, and when enough of them are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from structlog.contextvars import bound_contextvars

from aggregator.buffering import Buffers
from aggregator.fleet.authority import Authority
from aggregator.fleet.presence import Presence
from aggregator.gathering import Gathering, gather, selection
from aggregator.records import Campaign, NoiseTree, Round, Version
from aggregator.registry.publishing import manifest_of
from aggregator.rounds import machine
from aggregator.rounds.clipping import adapted
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
from aggregator.work import Work
from models.assignment import described
from models.manifest import ModelManifest
from protocol.dp.events import event_for
from protocol.errors import ProtocolError
from protocol.plan import TrainingParameters, TrainTask
from protocol.round_encoding import round_encoding

logger = logging.getLogger(__name__)


class Starter:
    """Starts what campaigns ask for. It belongs to the main loop; nothing in it is shared."""

    def __init__(
        self,
        authority: Authority,
        trust: Trust,
        presence: Presence,
        buffers: Buffers,
        entropy: Callable[[], bytes],
    ) -> None:
        """Prepares a starter that no campaign waits for yet.

        Args:
            entropy: returns 32 fresh random bytes, for round ids.
        """
        self._authority = authority
        self._trust = trust
        self._presence = presence
        self._buffers = buffers
        self._entropy = entropy
        self._patience: dict[str, float] = {}

    def reconnected(self) -> None:
        """Takes in that devices can be reached again: whoever is to come gets the whole time for it."""
        self._patience.clear()

    def serve(self, work: Work, campaigns: Sequence[Campaign], running: dict[str, RunningRound]) -> None:
        """Starts the next round of every campaign whose turn it is.

        A model is trained by one campaign at a time, because each round goes on from the version of the one
        before; one that waits for its time lets others go. Evaluations of a model are one at a time beside
        that, and so are queries. A device is in one round only. Queries and evaluations go first, or the
        rounds of a long campaign would leave them no devices until its end.

        Args:
            campaigns: those that have rounds to run.
            running: the running rounds by id; those that begin are added.
        """
        at_work = {each.record.campaign_id for each in running.values()}
        busy = {_lane(each.record.model, each.state.plan.task) for each in running.values()}
        lanes = [(_lane(campaign.model, asked_by(campaign)), campaign) for campaign in campaigns]
        for lane, campaign in sorted(lanes, key=lambda each: each[0].trains):
            if lane in busy:
                if campaign.campaign_id in at_work and campaign.started < campaign.rounds:
                    self._keep_training(work, campaign, running)
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
                self._serve_one(work, campaign, running)
            except (BudgetRefused, ProtocolError, LostBase, ValueError) as error:
                if not _wanted(work, campaign):
                    continue
                work.writer.update_campaign(campaign.campaign_id, "failed", str(error)[:300])
                work.writer.fell_noise_tree(campaign.campaign_id)
                work.writer.forget_optimizer_memory(campaign.campaign_id)
                logger.error("campaign %s failed: %s", campaign.campaign_id[:8], error)

    def _keep_training(self, work: Work, campaign: Campaign, running: Mapping[str, RunningRound]) -> None:
        """Lets devices train while a buffer of the same campaign is collected."""
        settings = readable(campaign)
        if settings is not None and settings.buffered and campaign.status == "running":
            version = self._version(work, campaign.model, settings)
            self._buffers.ask(work, campaign, settings, version, self._idle(campaign, running))

    def _waiting(
        self, work: Work, campaign: Campaign, settings: CampaignSettings, idle: frozenset[str]
    ) -> frozenset[str]:
        """The idle devices whose updates wait for a buffer; the others are asked to train."""
        version = self._version(work, campaign.model, settings)
        self._buffers.ask(work, campaign, settings, version, idle)
        return idle & self._buffers.waiting(campaign.campaign_id, version.version, settings.maximum_staleness)

    def _idle(self, campaign: Campaign, running: Mapping[str, RunningRound]) -> frozenset[str]:
        """The devices that are online and in no round.

        Whoever was in a round of the campaign is told of its end first: a buffer's devices are to train from
        the version that comes of it.
        """
        return self._presence.online() - {
            device_id
            for each in running.values()
            for device_id in each.state.invited
            if each.record.campaign_id == campaign.campaign_id or machine.expects(each.state, device_id)
        }

    def _serve_one(self, work: Work, campaign: Campaign, running: dict[str, RunningRound]) -> None:
        settings = placed(
            CampaignSettings.from_bytes(campaign.settings), campaign.campaign_id, campaign.started + 1
        )
        online = self._idle(campaign, running)
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
            why = self._buffers.why_refused(campaign.campaign_id) if settings.buffered else ""
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
        self._start(work, campaign, settings, available, running)

    def _start(
        self,
        work: Work,
        campaign: Campaign,
        settings: CampaignSettings,
        pool: tuple[str, ...],
        running: dict[str, RunningRound],
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
                event_for(each.encoding, each.encoding.minimum_survivors) for each in running.values()
            ]
            check_limit([*spent_events(work.writer), *reserved], encoding, settings.epsilon_limit)
        number = campaign.started + 1
        drawn = selection(work.writer, campaign, settings, pool, number)
        report = RoundReport()
        if settings.buffered and base is not None:
            collects = self._buffers.report(campaign.campaign_id, drawn.chosen, base.version)
            report = RoundReport(buffer=collects)
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
            report=report.to_bytes(),
        )
        tree = settings.privacy.tree
        known = work.writer.noise_tree(campaign.campaign_id)
        if tree is not None and (known is None or known.tree != tree.tree):
            work.writer.plant_noise_tree(NoiseTree(campaign.campaign_id, tree.tree, self._entropy()))
        running[round_id] = RunningRound.begin(work, record, drawn, assignment, self._trust)
        if settings.buffered:
            self._buffers.collected(campaign.campaign_id, drawn.chosen)
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
