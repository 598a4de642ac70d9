"""What an operator asks of a version: an evaluation, as the settings of a campaign of one round."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, ValidationError

from aggregator.rounds.planning import GATHER_SECONDS, CampaignSettings, VersionToEvaluate
from aggregator.rounds.selector import InvalidSelector, parse
from aggregator.settings import (
    DEFAULT_COHORT,
    DEFAULT_DELTA,
    DEFAULT_NOISE_MULTIPLIER,
    InvalidSettings,
    cohort_of,
    colluders_of,
    given,
    invalid,
    seed_of,
)
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.plan import SUBCOHORT_LIMIT, Deadlines
from protocol.ring import MAX_BITS

_THIRD = 1 / math.sqrt(3)
PLAIN_SLOTS = (
    MetricSlot(name="loss", bound=10.0, share=_THIRD),
    MetricSlot(name="accuracy", bound=1.0, share=_THIRD),
    MetricSlot(name="examples", bound=100_000.0, share=_THIRD),
)
"""What evaluations without noise report."""
PRIVATE_SLOTS = (
    MetricSlot(name="loss", bound=4.0, share=0.6),
    MetricSlot(name="accuracy", bound=1.0, share=0.8),
)
"""What evaluations with noise report: at noise multiplier 1, accuracy has a noise of 0.63 / devices."""


@dataclass(frozen=True)
class EvaluationRequest:
    """Which version is to be evaluated, and by whom; None takes the default.

    Attributes:
        version: by default the newest.
        cohort: devices in a full cohort.
        privacy: who adds noise.
        noise_multiplier: noise over sensitivity; by default 1 where there is noise.
        colluders: distributed mode: survivors that may reveal their noise; that of the others suffices.
        epsilon_limit: nothing is asked if it would take the fleet beyond it.
        where: which devices, such as `label=held-out`; everybody by default.
        held_out: ask only devices that have no part in any version of the model; else these go first.
        over_select: invite so many times the cohort; the first to check in make the roster.
        seed: draws the cohort; random by default.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    model: str
    version: int | None = None
    cohort: int = DEFAULT_COHORT
    minimum: int | None = None
    min_survivors: int | None = None
    subcohort_limit: int = SUBCOHORT_LIMIT
    privacy: PrivacyMode = PrivacyMode.DISTRIBUTED
    noise_multiplier: float | None = None
    colluders: int = 0
    delta: float = DEFAULT_DELTA
    deadlines: Deadlines = dataclasses.field(default_factory=Deadlines)
    gather_seconds: float = GATHER_SECONDS
    epsilon_limit: float | None = None
    where: str = ""
    held_out: bool = False
    over_select: float = 1.0
    seed: int | None = None

    def resolve(self, version: int) -> CampaignSettings:
        """Fills in what was not said.

        Args:
            version: number of the version to evaluate.

        Raises:
            InvalidSettings: it says what is wrong.
        """
        if self.privacy is PrivacyMode.EXAMPLE:
            raise InvalidSettings("an evaluation trains nothing: mode example has no examples to hide")
        no_noise = self.privacy is PrivacyMode.NONE
        try:
            return CampaignSettings(
                asks=VersionToEvaluate(
                    version=version,
                    slots=PLAIN_SLOTS if no_noise else PRIVATE_SLOTS,
                    held_out=self.held_out,
                ),
                privacy=PrivacyParameters(
                    mode=self.privacy,
                    clip_norm=1.0,
                    noise_multiplier=given(
                        self.noise_multiplier, 0.0 if no_noise else DEFAULT_NOISE_MULTIPLIER
                    ),
                    delta=self.delta,
                    colluders=colluders_of(self.colluders, self.privacy),
                    # The vector is short: the widest ring costs nothing, and takes the finest steps.
                    bits=MAX_BITS,
                    rotation=False,
                ),
                cohort=cohort_of(self.cohort, self.minimum, self.min_survivors, self.subcohort_limit),
                deadlines=self.deadlines,
                gather_seconds=self.gather_seconds,
                selection_seed=seed_of(self.seed),
                where=parse(self.where),
                over_select=self.over_select,
                epsilon_limit=self.epsilon_limit,
            )
        except ValidationError as error:
            raise invalid(error) from error
        except InvalidSelector as error:
            raise InvalidSettings(f"where: {error}") from error
