"""What a campaign would cost in privacy, utility and bytes, before any data is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import ValidationError

from aggregator.privacy.budget import Budget
from aggregator.privacy.solving import solve_noise_multiplier
from protocol.dp.accounting import spend
from protocol.dp.errors import CohortTooSmall, InvalidParameters
from protocol.dp.events import event_for
from protocol.dp.parameters import NoiseDistribution, PrivacyMode, PrivacyParameters, TreeNoise
from protocol.dp.scaling import EncodingParameters, derive_encoding
from protocol.plan import SUBCOHORT_LIMIT
from protocol.ring import MAX_BITS, packed_size
from protocol.secagg.subcohorts import Split

COLLUDING_FRACTIONS = (0.0, 0.01, 0.05, 0.1, 1 / 3)
"""Shares of the fewest accepted survivors for which a forecast says what their noise was worth."""


@dataclass(frozen=True)
class Intention:
    """What somebody thinks of running.

    Attributes:
        population: enrolled devices that may take part.
        cohort: devices in a full round.
        rounds: how many rounds; every device is assumed to be in all of them.
        delta: the delta at which epsilon is stated.
        epsilon: what the rounds may cost together; None when the noise multiplier is given.
        noise_multiplier: z; None when it is to be solved for.
        minimum_survivors: fewest updates in a sum; by default the smallest number above two thirds.
        dimension: parameters of the model.
        restart_every: rounds of one noise tree in central mode; None for noise of each round's own.
        subcohort_limit: a larger cohort is split, and has noise for each sub-cohort's sum.
    """

    population: int
    cohort: int
    rounds: int
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    mode: PrivacyMode = PrivacyMode.DISTRIBUTED
    bits: int = 16
    clip_norm: float = 1.0
    minimum_survivors: int | None = None
    colluders: int = 0
    dimension: int = 50_000
    noise: NoiseDistribution = NoiseDistribution.SKELLAM
    restart_every: int | None = None
    subcohort_limit: int = SUBCOHORT_LIMIT

    @property
    def split(self) -> Split:
        """The sub-cohorts of a full round; one, unless the cohort is too large."""
        return Split.of(max(1, self.cohort), max(1, self.subcohort_limit))


@dataclass(frozen=True)
class Outcome:
    """What becomes of the guarantee or the noise under one circumstance.

    Attributes:
        survivors: updates in every sum.
        colluders: of them, those that reveal their noise.
        epsilon_total: after all rounds.
        noise_norm: expected L2 norm of the noise in the mean update, in the unit of the parameters.
    """

    survivors: int
    colluders: int
    epsilon_total: float
    noise_norm: float


@dataclass(frozen=True)
class Forecast:
    """An intention with everything that follows from it.

    Attributes:
        epsilon_per_round: of one round at the fewest accepted survivors.
        epsilon_total: of all rounds, for a device that is in all of them.
        participations: rounds that one device is in on average.
        epsilon_participations: what those cost, the figure of the average device's own ledger.
        bytes_up: one device's packed masked input.
        colluding: with the fewest survivors and more and more colluders.
        dropping: from nobody dropping out to the most that a round accepts.
    """

    intention: Intention
    encoding: EncodingParameters
    epsilon_per_round: float
    epsilon_total: float
    participations: int
    epsilon_participations: float
    bytes_up: int
    colluding: tuple[Outcome, ...]
    dropping: tuple[Outcome, ...]

    @property
    def noise_norm(self) -> float:
        """Expected L2 norm of the noise in the mean update, at the fewest accepted survivors."""
        return noise_norm(self.encoding, self.encoding.minimum_survivors, self.intention.split.count)


def forecast(intention: Intention) -> Forecast:
    """Works out an intention.

    Raises:
        CohortTooSmall: the cohort is below the fewest survivors, or no cohort at all.
        RingTooNarrow: the ring overflows; says which width would do.
        NoiseUnsolvable: no noise reaches the epsilon.
        InvalidParameters: any other figure that makes no campaign: C of 0, epsilon of 0, delta of 1.
    """
    survivors = _check(intention)
    given = intention.noise_multiplier
    silent = intention.mode is PrivacyMode.NONE
    try:
        privacy = PrivacyParameters(
            mode=intention.mode,
            clip_norm=intention.clip_norm,
            noise_multiplier=0.0 if silent else 1.0 if given is None else given,
            delta=intention.delta,
            bits=intention.bits,
            noise=intention.noise,
            colluders=intention.colluders,
            tree=None
            if intention.restart_every is None
            else TreeNoise(restart_every=intention.restart_every),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidParameters(f"{where}: {first['msg']}" if where else first["msg"]) from error
    if intention.epsilon is not None:
        privacy = solve_noise_multiplier(
            privacy,
            Budget(intention.epsilon, intention.delta),
            rounds=intention.rounds,
            dimension=intention.dimension,
            minimum_survivors=survivors,
            maximum_clients=intention.split.largest,
        )
    encoding = derive_encoding(
        privacy,
        dimension=intention.dimension,
        minimum_survivors=survivors,
        maximum_clients=intention.split.largest,
        rotation_seed=bytes(32),
    )
    full = intention.split.average
    participations = math.ceil(intention.rounds * intention.cohort / intention.population)
    most = most_contributions(encoding, intention.rounds)
    return Forecast(
        intention,
        encoding,
        epsilon_per_round=epsilon_of(encoding, 1),
        epsilon_total=epsilon_of(encoding, most),
        participations=participations,
        epsilon_participations=epsilon_of(encoding, min(participations, most)),
        bytes_up=packed_size(encoding.length, encoding.bits),
        colluding=tuple(
            _outcome(intention, encoding, most, survivors, colluders)
            for colluders in sorted({math.floor(fraction * survivors) for fraction in COLLUDING_FRACTIONS})
        ),
        dropping=tuple(
            _outcome(intention, encoding, most, count, intention.colluders)
            for count in sorted({full, (full + survivors) // 2, survivors}, reverse=True)
        ),
    )


def most_contributions(encoding: EncodingParameters, rounds: int) -> int:
    """In how many of `rounds` rounds one device can be: in all, or in one of each noise tree."""
    tree = encoding.privacy.tree
    return rounds if tree is None else math.ceil(rounds / tree.restart_every)


def epsilon_of(encoding: EncodingParameters, contributions: int) -> float:
    """Epsilon of a device that was in so many rounds at the fewest accepted survivors."""
    event = event_for(encoding, encoding.minimum_survivors)
    return spend({event: contributions}, encoding.privacy.delta).epsilon


def epsilon_curve(encoding: EncodingParameters, rounds: int) -> list[tuple[int, float]]:
    """Epsilon after 1, ..., `rounds` rounds at up to 60 points, for a plot."""
    points = sorted({max(1, round(rounds * (index / 60) ** 2)) for index in range(1, 61)})
    return [(count, epsilon_of(encoding, most_contributions(encoding, count))) for count in points]


def rounding_factor(encoding: EncodingParameters) -> float:
    """How much louder the noise is than without rounding: the rounded norm bound over the unrounded one."""
    return math.sqrt(encoding.norm_bound_squared) / encoding.radius


def wider_ring(encoding: EncodingParameters) -> int | None:
    """The fewest bits with which rounding costs at most 5 % of noise; None if these or no bits do."""
    if rounding_factor(encoding) <= 1.05:
        return None
    for bits in range(encoding.bits + 1, MAX_BITS + 1):
        wider = derive_encoding(
            encoding.privacy.model_copy(update={"bits": bits}),
            dimension=encoding.dimension,
            minimum_survivors=encoding.minimum_survivors,
            maximum_clients=encoding.maximum_clients,
            rotation_seed=encoding.rotation_seed,
        )
        if rounding_factor(wider) <= 1.05:
            return bits
    return None


def noise_norm(encoding: EncodingParameters, survivors: int, subcohorts: int = 1) -> float:
    """Expected L2 norm of the noise in the mean update: sqrt(d) standard deviations of one coordinate.

    With sub-cohorts it is that in the mean of their means, at so many survivors in each.
    With a noise tree it is that in the sum of all mean updates since the restart, where it is largest.
    """
    tree = encoding.privacy.tree
    if tree is not None:
        # The most binary digits that are 1, of any leaf of the tree.
        sum_variance = ((tree.restart_every + 1).bit_length() - 1) * encoding.central_variance
        return math.sqrt(encoding.dimension * sum_variance) / (encoding.scale * encoding.maximum_clients)
    variance = survivors * encoding.local_variance + encoding.central_variance
    return math.sqrt(encoding.dimension * variance / subcohorts) / (encoding.scale * survivors)


def _check(intention: Intention) -> int:
    """Refuses figures that the encoding does not look at; returns the fewest survivors."""
    cohort, population = intention.cohort, intention.population
    if (intention.epsilon is None) == (intention.noise_multiplier is None) and (
        intention.mode is not PrivacyMode.NONE or intention.epsilon is not None
    ):
        raise InvalidParameters("give either an epsilon to reach or a noise multiplier")
    if intention.epsilon is not None:
        Budget(intention.epsilon, intention.delta)  # before anything is worked out
    if intention.rounds < 1:
        raise InvalidParameters(f"need at least one round, got {intention.rounds}")
    survivors, part = intention.minimum_survivors, intention.split.average
    if survivors is None:
        survivors = max(2, min(part, 2 * part // 3 + 1))
    if not 2 <= survivors <= part:
        raise CohortTooSmall(f"a cohort of {part} cannot give the {survivors} updates that a sum needs")
    if intention.restart_every is not None and intention.restart_every * cohort > population:
        raise CohortTooSmall(
            f"no device is in two rounds of a noise tree: {intention.restart_every} cohorts of {cohort} are "
            f"{intention.restart_every * cohort} devices, and the population has {population}"
        )
    if cohort > population:
        raise CohortTooSmall(f"a population of {population} cannot give a cohort of {cohort}")
    return survivors


def _outcome(
    intention: Intention, encoding: EncodingParameters, contributions: int, survivors: int, colluders: int
) -> Outcome:
    event = event_for(encoding, survivors).model_copy(update={"colluders": colluders})
    return Outcome(
        survivors,
        colluders,
        spend({event: contributions}, encoding.privacy.delta).epsilon,
        noise_norm(encoding, survivors, intention.split.count),
    )
