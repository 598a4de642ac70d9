"""From what an operator asks for to the signed plan of one round."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal, assert_never

from pydantic import Field, ValidationError

from aggregator.clock import Moment
from aggregator.optimizers import Server, ServerOptimizer, server_optimizer
from aggregator.records import Campaign
from aggregator.rounds.selector import Selector
from aggregator.schedule import Schedule
from models.assignment import Answering, Assignment, Evaluating, Training
from models.manifest import ModelManifest
from protocol.dp.parameters import MetricSlot, PrivacyParameters
from protocol.errors import MalformedMessage, ProtocolError
from protocol.fields import Bytes32, RoundId, Schema, Slug
from protocol.plan import (
    CohortParameters,
    Deadlines,
    EvaluateTask,
    Plan,
    QueryTask,
    Task,
    TrainingParameters,
    TrainTask,
)
from protocol.round_encoding import METRICS, round_encoding
from protocol.secagg.parameters import parameters

GATHER_SECONDS = 3.0
PLAIN_METRICS = (
    MetricSlot(name="examples", bound=10_000.0, share=0.05),
    MetricSlot(name="loss_before", bound=10.0, share=0.05),
    MetricSlot(name="loss_after", bound=10.0, share=0.05),
    MetricSlot(name="accuracy", bound=1.0, share=0.05),
)
"""What rounds without noise report; the small shares leave the ring to the update."""

PRIVATE_METRICS = (
    MetricSlot(name="loss_after", bound=4.0, share=0.25),
    MetricSlot(name="accuracy", bound=1.0, share=0.25),
)
"""What rounds with noise report. Each multiplies the sensitivity (both together by 1.06), and a smaller share
would leave nothing of the metric: its noise is `RoundReport.metric_noise`."""


EXAMPLE_METRIC = PLAIN_METRICS[:1]
"""What rounds in mode example report: the other metrics would tell of single examples."""


class VersionToEvaluate(Schema):
    """A campaign that evaluates one version of its model."""

    kind: Literal["evaluate"] = "evaluate"
    version: Annotated[int, Field(ge=1, le=2**31)]
    slots: tuple[MetricSlot, ...]
    held_out: bool = False
    """Ask only devices that have no part in any version of the model; else these go first."""


class ServerStep(Schema):
    """How the mean update of a round moves the model."""

    optimizer: Server = Server.FEDAVG
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] | None = None
    """The optimizer's own when None."""

    def make(self) -> ServerOptimizer:
        """The optimizer, ready to use."""
        return server_optimizer(self.optimizer, self.learning_rate)


class CampaignSettings(Schema):
    """What every round of a campaign has in common."""

    asks: TrainingParameters | VersionToEvaluate | QueryTask
    """Train a model, round after round; evaluate a version; or answer a query."""
    privacy: PrivacyParameters
    cohort: CohortParameters
    deadlines: Deadlines = Deadlines()
    gather_seconds: Annotated[float, Field(ge=0, le=3600)] = GATHER_SECONDS
    """With the minimum online, how long to wait for a full cohort before a round starts without it."""
    selection_seed: Bytes32
    """Cohorts are drawn from this and the round's number, so that a draw can be repeated."""
    schedule: Schedule | None = None
    """When rounds are due; without one, each follows on the one before."""
    server: ServerStep = ServerStep()
    where: Selector = ()
    """Only devices that fit are invited."""
    rest_rounds: Annotated[int, Field(ge=0, le=1000)] = 0
    """Whoever was in one of so many rounds before gets only the places that nobody else takes."""
    over_select: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Invite so many times the cohort; the first to check in make the roster."""
    buffered: bool = False
    """Devices train when they can, and each round collects the updates that wait (`aggregator.buffering`)."""
    epsilon_limit: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """No round starts that would take the population beyond this epsilon, at the delta of `privacy`."""

    @property
    def maximum_staleness(self) -> int:
        """Versions that a device may be behind; 0 where nothing is trained."""
        return self.asks.maximum_staleness if isinstance(self.asks, TrainingParameters) else 0

    def to_bytes(self) -> bytes:
        """The JSON that the repository keeps."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> CampaignSettings:
        """Parses `to_bytes`.

        Raises:
            MalformedMessage: not the settings of this version.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise MalformedMessage(f"not campaign settings: {error.errors()[0]['msg']}") from error

    def round_seed(self, number: int) -> bytes:
        """The seed that round `number` of the campaign draws its cohort with."""
        return hashlib.sha256(self.selection_seed + number.to_bytes(8, "big")).digest()


def readable(campaign: Campaign) -> CampaignSettings | None:
    """The settings of a campaign; None for those of another Covey's, which cannot be read."""
    try:
        return CampaignSettings.from_bytes(campaign.settings)
    except MalformedMessage:
        return None


def asked_by(campaign: Campaign) -> TrainingParameters | VersionToEvaluate | QueryTask | None:
    """What a campaign asks; None for one that cannot be read."""
    settings = readable(campaign)
    return None if settings is None else settings.asks


def assign(
    settings: CampaignSettings, base: ModelManifest | None, order: RoundId | None = None
) -> Assignment:
    """What the next round of a campaign asks.

    Args:
        settings: of the campaign.
        base: the version to improve or to evaluate; None for a query.
        order: id of the standing order whose updates a buffered campaign collects: that of the campaign.

    Raises:
        ValueError: training or evaluation without a version.
    """
    asks = settings.asks
    if isinstance(asks, QueryTask):
        return Answering(asks)
    if base is None:
        raise ValueError("training and evaluation need a version")
    if isinstance(asks, VersionToEvaluate):
        return Evaluating(
            EvaluateTask(
                model=base.name, version=base.version, manifest_sha256=base.sha256(), slots=asks.slots
            ),
            base,
        )
    if isinstance(asks, TrainingParameters):
        task = TrainTask(
            model=base.name,
            base_version=base.version,
            manifest_sha256=base.sha256(),
            training=asks,
            order=order if settings.buffered else None,
        )
        return Training(task, base)
    assert_never(asks)


def make_plan(
    settings: CampaignSettings,
    fleet: Slug,
    round_id: RoundId,
    task: Task,
    now: Moment,
) -> Plan:
    """Makes the plan of one round.

    Args:
        settings: of the campaign.
        fleet: the fleet's name.
        round_id: fresh, 128 random bits.
        task: what the round asks of each device.
        now: the plan is valid from here until every deadline has passed.
    """
    limits = settings.deadlines
    phases = (
        limits.advertise_keys,
        limits.share_keys,
        limits.masked_input,
        limits.consistency_check,
        limits.unmasking,
    )
    return Plan(
        fleet=fleet,
        round_id=round_id,
        task=task,
        privacy=settings.privacy,
        cohort=settings.cohort,
        deadlines=limits,
        issued_at=int(now.unix),
        # A minute more: a device's clock may be a little ahead.
        expires_at=int(now.unix) + math.ceil(sum(phases)) + 60,
    )


def check_settings(settings: CampaignSettings, base: ModelManifest | None) -> None:
    """Refuses settings that no round could follow, before anything is stored.

    Args:
        settings: of a campaign.
        base: the version to improve or to evaluate; None for a query.

    Raises:
        ValueError: it says what to change.
    """
    if settings.over_select > 1 and settings.cohort.split.count > 1:
        raise ValueError("a cohort that is split cannot be over-selected: raise its sub-cohort limit")
    if settings.buffered:
        _check_buffered(settings)
    unknown = {slot.name for slot in settings.privacy.metric_slots} - METRICS.keys()
    if unknown:
        raise ValueError(f"devices know no metric {sorted(unknown)}; they know {sorted(METRICS)}")
    if settings.privacy.example is not None and base is not None and not base.example_gradients:
        raise ValueError(
            f"{base.name} gives no gradients of single examples, which mode example trains with: export it "
            f"with example_gradients=True"
        )
    try:
        assignment = assign(settings, base, "0" * 32)
        trial = make_plan(settings, "trial", "0" * 32, assignment.task, Moment(0, 0))
        round_encoding(trial, bytes(32), assignment.dimension)
        cohort = settings.cohort
        for size in (cohort.split.largest, cohort.minimum):
            parameters(size, cohort.split.assumptions(size, cohort.graph))
    except (ProtocolError, ValueError) as error:
        raise ValueError(f"no round can follow these settings: {error}") from error


def _check_buffered(settings: CampaignSettings) -> None:
    if not isinstance(settings.asks, TrainingParameters):
        raise ValueError("only training is buffered")
    if settings.schedule is not None:
        raise ValueError("a buffer is collected when it is full, by no schedule: leave one of them out")
    if settings.privacy.adaptive is not None or settings.privacy.tree is not None:
        raise ValueError(
            "buffers have one clip norm and noise of their own: no adaptive clipping, no noise tree"
        )
