"""What a round spent: a record for the transcript, from which anybody can re-compute the ledger.

An event says what happened and never what it costs; costing is the accountant's business
(`protocol.dp.accounting`, `aggregator.privacy`), as in `dp_accounting`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.dp.errors import TooFewSurvivors
from protocol.dp.parameters import TREE_ID, NoiseDistribution, PrivacyMode
from protocol.dp.sampling import discrete_gaussian_distance, skellam_distance
from protocol.dp.scaling import EncodingParameters


class Mechanism(enum.StrEnum):
    """The distribution whose divergence the accountant needs."""

    NONE = "none"
    SKELLAM = "skellam"
    DISCRETE_GAUSSIAN = "discrete_gaussian"


class NeighbouringRelation(enum.StrEnum):
    """Which two inputs must look alike."""

    ZERO_OUT = "zero_out"
    """One device's vector is replaced by zeros while the device still takes part and adds its noise. Rosters
    and survivor sets are public in secure aggregation, so participation itself is not hidden, and with
    distributed noise a missing device would take its noise with it. The sensitivity is that of adding or
    removing a device: one clipped vector (Kairouz et al. 2021b, arXiv 2103.00039, Definition 1.1)."""
    ADD_OR_REMOVE = "add_or_remove"


_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DPEvent(BaseModel):
    """One release of a noisy integer sum."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    v: Literal[1] = 1
    mechanism: Mechanism
    mode: PrivacyMode
    unit: Literal["device", "example"] = "device"
    """Whose vector is hidden: a device's, or that of one of its examples."""
    neighbouring_relation: NeighbouringRelation = NeighbouringRelation.ZERO_OUT
    noise_multiplier: _Finite
    """z as planned; what was reached follows from the integers below."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sensitivity_squared: Annotated[int, Field(ge=0)]
    """Squared L2 norm that one client's integers cannot exceed, in squared quantization steps."""
    variance_per_share: _Finite
    """Variance of one noise share per coordinate: a client's (distributed, local) or the aggregator's."""
    dimension: Annotated[int, Field(ge=1)]
    """Coordinates of the released vector, metric slots included."""
    survivors: Annotated[int, Field(ge=1)]
    minimum_survivors: Annotated[int, Field(ge=1)]
    colluders: Annotated[int, Field(ge=0)] = 0
    """Survivors whose noise is not counted, because they may tell it."""
    sampler_distance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Total-variation distance of one noise sample from the named distribution."""
    sums: Annotated[int, Field(ge=1)] = 1
    """How many noisy sums may hold the unit's vector: steps of DP-SGD, or the nodes over a tree's leaf."""
    sampling_probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Chance that the unit is in any one of the sums, by a secret coin of its own each time."""
    tree: Annotated[str, Field(pattern=TREE_ID)] | None = None
    """Of whose nodes' noisy sums this is; a device is in one round of a tree, so that all of them together
    cost it what one costs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.unit == "example" and self.mode is not PrivacyMode.EXAMPLE:
            raise ValueError(f"mode {self.mode} hides devices, not examples")
        # In mode example the sum of the devices' updates gets no noise: it hides no device.
        silent = self.mode is PrivacyMode.NONE or (self.mode is PrivacyMode.EXAMPLE and self.unit == "device")
        if silent != (self.mechanism is Mechanism.NONE):
            raise ValueError(f"mode {self.mode} does not go with mechanism {self.mechanism}")
        if not silent and not (self.variance_per_share and self.sensitivity_squared):
            raise ValueError("a private event has a variance and a sensitivity")
        if self.shares < 1:
            raise ValueError("every survivor colludes: no noise is left")
        return self

    @property
    def shares(self) -> int:
        """How many independent noise shares count; in local mode a device relies on nobody's but its own."""
        return self.survivors - self.colluders if self.mode is PrivacyMode.DISTRIBUTED else 1

    @property
    def variance(self) -> float:
        """Variance of the noise that counts, per coordinate of the sum."""
        return self.shares * self.variance_per_share


def for_one_example(event: DPEvent) -> DPEvent:
    """What a contribution costs one example of the device, in whichever mode it was made.

    A mode that hides the device bounds its vector; another example moves it from one vector within the bound
    to another, by twice the sensitivity at most.
    """
    if event.unit == "example":
        return event
    doubled = 4 * event.sensitivity_squared
    return event.model_copy(update={"unit": "example", "sensitivity_squared": doubled})


def event_for(params: EncodingParameters, survivors: int) -> DPEvent:
    """Describes the release of a sum of `survivors` vectors encoded with `params`; the unit is the device.

    Raises:
        TooFewSurvivors: such a sum must not be released.
    """
    if survivors < params.minimum_survivors:
        raise TooFewSurvivors(f"{survivors} survivors, the noise was sized for {params.minimum_survivors}")
    privacy = params.privacy
    private = not privacy.silent
    variance = params.local_variance + params.central_variance  # at most one of them is not 0
    skellam = privacy.noise is NoiseDistribution.SKELLAM
    distance = skellam_distance if skellam else discrete_gaussian_distance
    return DPEvent(
        mechanism=Mechanism(privacy.noise.value) if private else Mechanism.NONE,
        mode=privacy.mode,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sensitivity_squared=params.norm_bound_squared,
        variance_per_share=variance,
        dimension=params.length,
        survivors=survivors,
        minimum_survivors=params.minimum_survivors,
        colluders=privacy.colluders,
        sampler_distance=distance(variance) if private else 0.0,
        sums=1 if privacy.tree is None else privacy.tree.height,
        tree=None if privacy.tree is None else privacy.tree.tree,
    )
