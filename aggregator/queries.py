"""What an operator asks the fleet: a query from a few figures, as the settings of a campaign of one round."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, ValidationError

from aggregator.rounds.planning import GATHER_SECONDS, CampaignSettings
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
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.plan import SUBCOHORT_LIMIT, CohortParameters, Deadlines, QueryTask, Question
from protocol.ring import MAX_BITS

DEFAULT_BINS = 20
"""Of a histogram: as many bars as a terminal shows."""
DEFAULT_QUANTILE_BINS = 64
"""Of a quantile: the resolution is 1.6 % of the bounds, and a rank's noise at most 4 times that of a bin."""


@dataclass(frozen=True)
class QueryRequest:
    """What an operator asks; None takes the default.

    Attributes:
        field: name of the field, as its devices declare it.
        low, high: public bounds, which values are clipped to.
        cohort: devices in a full cohort.
        privacy: who adds noise.
        noise_multiplier: noise over sensitivity; by default 1 where there is noise.
        colluders: distributed mode: survivors that may reveal their noise; that of the others suffices.
        epsilon: chooses the noise multiplier so that this query costs at most this, in place of it.
        epsilon_limit: the query is not asked if it would take the fleet beyond it.
        where: which devices, such as `label=site:barn`; everybody by default.
        seed: draws the cohort; random by default.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    field: str
    low: float
    high: float
    question: Question
    cohort: int = DEFAULT_COHORT
    minimum: int | None = None
    min_survivors: int | None = None
    subcohort_limit: int = SUBCOHORT_LIMIT
    privacy: PrivacyMode = PrivacyMode.DISTRIBUTED
    noise_multiplier: float | None = None
    colluders: int = 0
    epsilon: float | None = None
    delta: float = DEFAULT_DELTA
    deadlines: Deadlines = dataclasses.field(default_factory=Deadlines)
    gather_seconds: float = GATHER_SECONDS
    epsilon_limit: float | None = None
    where: str = ""
    seed: int | None = None

    def resolve(self) -> CampaignSettings:
        """Fills in what was not said.

        Raises:
            InvalidSettings: it says what is wrong.
            PrivacyError: no noise keeps the query within `epsilon`.
        """
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise InvalidSettings("give an epsilon or a noise multiplier: each follows from the other")
        if self.privacy is PrivacyMode.EXAMPLE:
            raise InvalidSettings("a query asks a device for one value: mode example has no examples to hide")
        no_noise = self.privacy is PrivacyMode.NONE
        if self.epsilon is not None and no_noise:
            raise InvalidSettings("without noise there is no epsilon: choose another privacy mode")
        try:
            task = QueryTask(field=self.field, low=self.low, high=self.high, question=self.question)
            cohort = cohort_of(self.cohort, self.minimum, self.min_survivors, self.subcohort_limit)
            privacy = PrivacyParameters(
                mode=self.privacy,
                clip_norm=1.0,
                noise_multiplier=given(self.noise_multiplier, 0.0 if no_noise else DEFAULT_NOISE_MULTIPLIER),
                delta=self.delta,
                colluders=colluders_of(self.colluders, self.privacy),
                # The vector is short: the widest ring costs nothing, and takes the finest steps.
                bits=MAX_BITS,
                rotation=False,
            )
            if self.epsilon is not None:
                privacy = _within(privacy, self.epsilon, task, cohort)
            return CampaignSettings(
                asks=task,
                privacy=privacy,
                cohort=cohort,
                deadlines=self.deadlines,
                gather_seconds=self.gather_seconds,
                selection_seed=seed_of(self.seed),
                where=parse(self.where),
                epsilon_limit=self.epsilon_limit,
            )
        except ValidationError as error:
            raise invalid(error) from error
        except InvalidSelector as error:
            raise InvalidSettings(f"where: {error}") from error


def _within(
    privacy: PrivacyParameters, epsilon: float, task: QueryTask, cohort: CohortParameters
) -> PrivacyParameters:
    # Imported when a budget is given: accounting takes half a second.
    from aggregator.privacy import Budget, solve_noise_multiplier

    return solve_noise_multiplier(
        privacy,
        Budget(epsilon, privacy.delta),
        rounds=1,
        dimension=task.dimension,
        minimum_survivors=cohort.minimum_survivors,
        maximum_clients=cohort.split.largest,
    )
