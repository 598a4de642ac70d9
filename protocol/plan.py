"""The plan: what one round asks of its cohort, signed by the operator's key.

A device does nothing for a round but what its plan says, and every signature of the round covers the plan's
hash: an aggregator that shows two devices different plans gets no unmasking. What is asked is a closed union:
train a model further (`TrainTask`), say how well a version does on the device's own examples
(`EvaluateTask`), or answer a query over a number that the device's owner declares (`QueryTask`); all the rest
of a round is the same.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.dp.parameters import MetricSlot, PrivacyParameters
from protocol.errors import MalformedMessage
from protocol.fields import MAX_COHORT, PROTOCOL_VERSION, RoundId, Schema, Sha256, Slug, UnixTime
from protocol.secagg.parameters import GraphAssumptions
from protocol.secagg.subcohorts import Split

PLAN_KIND = "plan"
MODEL_KIND = "model-manifest"
ORDER_KIND = "training-order"
"""Of a plan that is no round: what updates that buffers collect later are trained by (`TrainTask.order`)."""

MAX_BINS = 4096
MAX_BOUND = 1e15
EVALUATION_METRICS = frozenset({"loss", "accuracy", "examples"})
"""What an evaluation may ask for."""
MIN_RELATIVE_WIDTH = 1e-9
"""Narrower bounds would ask for more digits than a double has left."""

SUBCOHORT_LIMIT = 4096
"""Where a cohort is split unless the plan says otherwise: a sub-cohort of this size costs a device no more
than one of a tenth does (its work grows with the logarithm), while the aggregator's memory, and what a
failure takes along, stay bounded."""

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class TrainingParameters(Schema):
    """Local training of one round."""

    local_epochs: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    proximal_mu: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of the FedProx term (Li et al. 2020, arXiv 1812.06127); 0 is FedAvg."""
    maximum_staleness: Annotated[int, Field(ge=0, le=100)] = 0
    """A device that has not got the base version yet may train from one that is so many older, at most."""


def staleness_weight(staleness: int) -> float:
    """1 / sqrt(1 + s): what an update from a version s older than the base version weighs.

    Nguyen et al. 2022 (FedBuff, arXiv 2106.06639), section 5, with a = 1/2 in (1 + s)^-a.
    """
    return 1.0 / math.sqrt(1 + staleness)


class TrainTask(Schema):
    """Train one version of a model further, on data that stays where it is."""

    kind: Literal["train"] = "train"
    model: Slug
    base_version: Annotated[int, Field(ge=1, le=2**31)]
    manifest_sha256: Sha256
    """Digest of the signed manifest of the base version: same graph, same starting weights for all."""
    training: TrainingParameters
    order: RoundId | None = None
    """None: train now. Else this is a buffer (Nguyen et al. 2022, FedBuff): contribute the update that was
    trained before by the standing order of this id, from a version at most `maximum_staleness` older. The
    order itself is a plan under its own id, signed as `ORDER_KIND`, so that no round can be made of it."""


class EvaluateTask(Schema):
    """Say how well one version of a model does on the device's own examples; nothing is trained.

    The vector has one element for each slot (`protocol.evaluation`). A figure in [0, bound] is clipped to it
    and scaled to [-share, share]. The squares of the shares add up to at most 1: so does its norm.
    """

    kind: Literal["evaluate"] = "evaluate"
    model: Slug
    version: Annotated[int, Field(ge=1, le=2**31)]
    manifest_sha256: Sha256
    """Digest of the signed manifest of the version."""
    slots: Annotated[tuple[MetricSlot, ...], Field(min_length=1, max_length=len(EVALUATION_METRICS))]

    @model_validator(mode="after")
    def _norm_is_at_most_one(self) -> Self:
        names = [slot.name for slot in self.slots]
        if not EVALUATION_METRICS.issuperset(names) or len(set(names)) != len(names):
            raise ValueError(
                f"an evaluation has {sorted(EVALUATION_METRICS)}, each once at most, not {names}"
            )
        # A little more: shares such as 1/sqrt(2) are rounded. The clip norm holds whatever they add up to.
        if sum(slot.share**2 for slot in self.slots) > 1 + 1e-9:
            raise ValueError("the squares of an evaluation's shares add up to more than 1")
        return self

    @property
    def dimension(self) -> int:
        """Elements of the vector that a device answers with."""
        return len(self.slots)


class SumQuestion(Schema):
    """The sum of the cohort's values."""

    kind: Literal["sum"] = "sum"


class MeanQuestion(Schema):
    """The mean of the cohort's values."""

    kind: Literal["mean"] = "mean"


class HistogramQuestion(Schema):
    """How many of the cohort's values lie in each of `bins` intervals of equal width."""

    kind: Literal["histogram"] = "histogram"
    bins: Annotated[int, Field(ge=2, le=MAX_BINS)]


class QuantileQuestion(Schema):
    """The value below which a share `q` of the cohort's values lie, from a histogram of `bins` intervals."""

    kind: Literal["quantile"] = "quantile"
    q: Annotated[float, Field(ge=0, le=1)]
    bins: Annotated[int, Field(ge=2, le=MAX_BINS)]


Question = Annotated[
    SumQuestion | MeanQuestion | HistogramQuestion | QuantileQuestion, Field(discriminator="kind")
]
Bound = Annotated[float, Field(ge=-MAX_BOUND, le=MAX_BOUND)]


class QueryTask(Schema):
    """Answer with one value of a field that the device's owner declares; no model has a part in it.

    A value is clipped to [low, high] on the device. The bounds are public, and nothing about them may come
    from the data: they alone bound what one device can change.
    """

    kind: Literal["query"] = "query"
    field: Slug
    low: Bound
    high: Bound
    question: Question

    @model_validator(mode="after")
    def _bounds_hold_an_interval(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.high - self.low < MIN_RELATIVE_WIDTH * max(abs(self.low), abs(self.high)):
            raise ValueError("low and high are too close together to tell values between them apart")
        return self

    @property
    def dimension(self) -> int:
        """Elements of the vector that a device answers with (`protocol.queries`)."""
        if isinstance(self.question, SumQuestion | MeanQuestion):
            return 1
        return self.question.bins


Task = Annotated[TrainTask | EvaluateTask | QueryTask, Field(discriminator="kind")]


class CohortParameters(Schema):
    """How many devices take part."""

    size: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """Devices invited, at most. The ring is wide enough for those of a sub-cohort."""
    minimum: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """A roster has at least this many, or its sub-cohort fails before anything is shared."""
    minimum_survivors: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """At least this many masked inputs are in a sum. The noise is sized for it."""
    subcohort_limit: Annotated[int, Field(ge=2, le=MAX_COHORT)] = SUBCOHORT_LIMIT
    """A cohort of more devices is split into sub-cohorts of at most this many on average, with a sum each."""

    graph: GraphAssumptions = GraphAssumptions()
    """What is assumed of the cohort; degree and threshold of the graph follow from it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum_survivors <= self.minimum <= self.size:
            raise ValueError("a cohort needs minimum_survivors <= minimum <= size")
        if self.minimum > self.split.average:
            raise ValueError(
                f"{self.split.count} sub-cohorts have {self.split.average} devices on average, "
                f"fewer than the minimum of {self.minimum}"
            )
        return self

    @property
    def split(self) -> Split:
        """How the cohort falls into sub-cohorts; most fall into one, which is the whole."""
        return Split.of(self.size, self.subcohort_limit)


class Deadlines(Schema):
    """Seconds that each phase lasts at most, and how long an offline device is waited for."""

    advertise_keys: Seconds = 30.0
    share_keys: Seconds = 30.0
    masked_input: Seconds = 600.0
    consistency_check: Seconds = 30.0
    unmasking: Seconds = 60.0
    offline_grace: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    """A phase ends early once every missing device has been offline for this long."""


class Plan(Schema):
    """One round: task, privacy, cohort and deadlines."""

    v: Literal[1] = PROTOCOL_VERSION
    fleet: Slug
    round_id: RoundId
    task: Task
    privacy: PrivacyParameters
    cohort: CohortParameters
    deadlines: Deadlines = Deadlines()
    issued_at: UnixTime
    expires_at: UnixTime

    @model_validator(mode="after")
    def _privacy_fits_the_task(self) -> Self:
        # The vector of a query or an evaluation has norm 1 by its definition and nothing rides behind it, so
        # that everybody who reads the plan knows what its noise multiplier means.
        privacy, trains = self.privacy, isinstance(self.task, TrainTask)
        if not trains and (privacy.clip_norm != 1 or privacy.slots or privacy.rotation):
            raise ValueError(
                f"{self._asked} has clip norm 1, no metrics behind it, no adaptive clipping and no rotation"
            )
        if privacy.tree is not None and (self.cohort.split.count > 1 or not trains):
            raise ValueError("a noise tree is for training by cohorts that are not split")
        if isinstance(self.task, TrainTask) and self.task.training.maximum_staleness and privacy.adaptive:
            raise ValueError("a clip norm adapts to updates that all weigh the same: allow no staleness")
        if isinstance(self.task, TrainTask) and self.task.order and (privacy.adaptive or privacy.tree):
            raise ValueError(
                "buffers have one clip norm and noise of their own: no adaptive clipping, no tree"
            )
        if not trains and privacy.example is not None:
            raise ValueError(f"{self._asked} asks for figures of a device: it has no examples to hide")
        return self

    @property
    def _asked(self) -> str:
        return "a query" if isinstance(self.task, QueryTask) else "an evaluation"

    def to_bytes(self) -> bytes:
        """The JSON bytes that are signed and hashed."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Plan:
        """Parses the payload of a signed plan.

        Raises:
            MalformedMessage: it is not a plan of this protocol version.
        """
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise MalformedMessage(f"not a plan: {error.errors()[0]['msg']}") from error
