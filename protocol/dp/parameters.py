"""What a training plan says about privacy: the part that is signed and that a device's policy reads.

Nothing here is derived: scale, ring sensitivity and noise variance follow from these figures, the model's
dimension and the cohort (`protocol.dp.mechanism.derive_encoding`), the same on every machine.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from protocol.ring import MAX_BITS, MIN_BITS


class PrivacyMode(enum.StrEnum):
    """Who adds the noise, and so whom a participant has to trust."""

    NONE = "none"
    """Clipping only. Allowed only if the plan and the device's policy both say so."""
    CENTRAL = "central"
    """The aggregator adds the noise when it releases the sum: trust in the aggregator."""
    DISTRIBUTED = "distributed"
    """Each client adds its share before masking: nobody ever holds an un-noised sum."""
    LOCAL = "local"
    """Each client's own noise suffices: nobody has to be trusted, not even to add up masked inputs only."""
    EXAMPLE = "example"
    """Each client trains by DP-SGD (`protocol.dp.example`). The unit is one of its examples: for devices that
    hold many people's data. The device itself is promised nothing."""


class NoiseDistribution(enum.StrEnum):
    """The integer noise. Sums of Skellam are Skellam, so accounting for shares is exact."""

    SKELLAM = "skellam"
    DISCRETE_GAUSSIAN = "discrete_gaussian"


_METRIC_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def _check_name(name: str) -> str:
    if _METRIC_NAME.fullmatch(name) is None:
        raise ValueError(f"a metric name matches {_METRIC_NAME.pattern}, got {name!r}")
    return name


_FinitePositive = Annotated[float, Field(ge=1e-12, le=1e12, allow_inf_nan=False)]
# Squares, and products with any cohort, stay far inside what a float can hold.


class MetricSlot(BaseModel):
    """One bounded number (weight, loss, accuracy) that rides behind the update in the same vector.

    A value is clipped to [-bound, bound] and scaled to [-share * C, share * C]. It is part of the
    sensitivity: slots multiply it by sqrt(1 + sum of share^2). The noise on a released mean is near
    bound * noise_multiplier / (share * survivors).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    name: Annotated[str, AfterValidator(_check_name)]
    bound: _FinitePositive
    """Largest magnitude, in the metric's own unit."""
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    """Which fraction of the clip norm the slot may use."""


CLIP_VOTE = "clip_vote"
"""Name of the mean vote among the metrics of a round."""


class AdaptiveClipping(BaseModel):
    """How the clip norm moves between the rounds of a campaign (`protocol.dp.adaptive`)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    quantile: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    """gamma: which quantile of the update norms the clip norm follows."""
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.2
    """eta: the clip norm moves by at most e^eta in a round."""
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    """Which fraction of the clip norm the vote may use; the noise of the mean vote is z / (share * n)."""


class ExamplePrivacy(BaseModel):
    """DP-SGD on the device (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1). The unit is one example."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    clip_norm: _FinitePositive
    """C of one example: L2 bound of its gradient."""
    noise_multiplier: Annotated[float, Field(ge=0.01, le=64, allow_inf_nan=False)]
    """z: standard deviation of the noise in the sum of a step's clipped gradients, over their bound."""
    sampling_probability: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)]
    """q: each example is in each step by a coin of its own on the device (Poisson sampling). 1 takes all."""

    def steps(self, local_epochs: int) -> int:
        """Steps of one round: an example is in as many of them, on average, as there are local epochs."""
        return max(1, round(local_epochs / self.sampling_probability))


TREE_ID = r"^[0-9a-f]{64}$"


class TreeNoise(BaseModel):
    """Central noise in the nodes of a tree over rounds (`protocol.dp.tree`): DP-FTRL.

    A device is in one round of a tree at most; then the tree restarts, and everybody has another turn.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    restart_every: Annotated[int, Field(ge=1, le=2**16)]
    """Rounds of one tree."""
    tree: Annotated[str, Field(pattern=TREE_ID)] = "0" * 64
    """Which tree a round is of; the aggregator puts it into each plan."""
    leaf: Annotated[int, Field(ge=1, le=2**16)] = 1
    """The round's place in its tree; the aggregator puts it into each plan."""

    @model_validator(mode="after")
    def _leaf_is_in_the_tree(self) -> Self:
        if self.leaf > self.restart_every:
            raise ValueError(f"leaf {self.leaf} is not in a tree of {self.restart_every} rounds")
        return self

    @property
    def height(self) -> int:
        """In how many nodes' sums a round is, at most: ceil(log2(restart_every + 1))."""
        return self.restart_every.bit_length()


EXAMPLE_METRICS = frozenset({"examples"})
"""The metrics of mode example: any other would tell of the examples without noise."""


class PrivacyParameters(BaseModel):
    """The privacy section of a training plan. Unit of privacy: the device, in mode example the example."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    mode: PrivacyMode
    clip_norm: _FinitePositive
    """C: L2 bound of one update, in the unit of the parameters."""
    noise_multiplier: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    """z: standard deviation of the noise in the sum of the fewest accepted honest survivors, or in local mode
    in each client's own vector, over the integer sensitivity (rounding included, so that it is the multiplier
    that the accountant sees)."""
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    """The delta at which epsilon is stated."""
    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    """b: width of the ring Z_{2^b}, which is what one coordinate costs on the wire."""
    noise: NoiseDistribution = NoiseDistribution.SKELLAM
    metric_slots: Annotated[tuple[MetricSlot, ...], Field(max_length=16)] = ()
    adaptive: AdaptiveClipping | None = None
    """Adds a vote on the clip norm to every vector; without it the clip norm is fixed."""
    rotation: bool = True
    """Whether a randomised Hadamard transform spreads the update evenly before it is rounded."""
    colluders: Annotated[int, Field(ge=0)] = 0
    """How many survivors may tell the aggregator their own noise; the others' noise must suffice."""
    example: ExamplePrivacy | None = None
    """How the devices train in mode example."""
    tree: TreeNoise | None = None
    """In central mode: correlates the noise of rounds; without it every round has noise of its own."""

    @property
    def silent(self) -> bool:
        """Whether nobody adds noise to the sum, so that no device is hidden in it."""
        return self.mode in {PrivacyMode.NONE, PrivacyMode.EXAMPLE}

    @model_validator(mode="after")
    def _mode_and_noise_agree(self) -> Self:
        if self.silent and self.noise_multiplier != 0:
            raise ValueError(f"mode {self.mode} adds no noise to the sum: noise_multiplier must be 0")
        if not self.silent and self.noise_multiplier == 0:
            raise ValueError(f"mode {self.mode} needs a noise_multiplier above 0")
        if (self.mode is PrivacyMode.EXAMPLE) != (self.example is not None):
            raise ValueError("mode example and the section `example` belong together")
        if self.mode is PrivacyMode.EXAMPLE:
            telling = sorted({slot.name for slot in self.metric_slots} - EXAMPLE_METRICS)
            if telling:
                raise ValueError(f"metrics {telling} would tell of the examples without noise")
        if self.tree is not None and (self.mode is not PrivacyMode.CENTRAL or self.adaptive is not None):
            raise ValueError("a noise tree needs mode central, and a clip norm that stays")
        names = [slot.name for slot in self.metric_slots]
        if len(set(names)) != len(names):
            raise ValueError(f"metric names repeat: {names}")
        if CLIP_VOTE in names:
            raise ValueError(f"{CLIP_VOTE} is no metric of its own: set `adaptive`")
        return self

    @property
    def slots(self) -> tuple[MetricSlot, ...]:
        """Everything that rides behind the update: the metric slots, then the vote."""
        if self.adaptive is None:
            return self.metric_slots
        return (*self.metric_slots, MetricSlot(name=CLIP_VOTE, bound=1.0, share=self.adaptive.share))
