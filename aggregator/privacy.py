"""The accountant, the budget gate and the noise solver: what rounds cost, and whether another one may start.

Costs are Renyi divergences, composed and converted by `dp_accounting`. A single discrete Gaussian is the
library's zCDP event. Sums of discrete Gaussians and Skellam noise are events that it lacks: their curves are
here, each from its theorem. No amplification by sampling is ever assumed for these: devices that check in
when they can are no Poisson sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from numpy.typing import NDArray

from protocol.dp.errors import InvalidParameters, RingTooNarrow
from protocol.dp.events import DPEvent, Mechanism, event_for
from protocol.dp.parameters import PrivacyParameters
from protocol.dp.scaling import EncodingParameters, derive_encoding

ORDERS: tuple[float, ...] = (
    *(1 + x / 100 for x in (1.5, 2, 3, 4, 5, 6, 8)),
    *(1 + x / 20 for x in range(2, 40)),
    *(x / 10 for x in range(30, 110)),
    *range(11, 64),
    *(64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024),
)
"""Renyi orders at which curves are evaluated. Epsilon is the minimum over them: each alone is valid."""

_MAX_NOISE_MULTIPLIER = 1e4
_NOISE_GRID = 1e-4  # solved multipliers are rounded up to it: short numbers in plans, never less noise


@dataclass(frozen=True)
class Budget:
    """What a population may spend in all.

    Raises:
        InvalidParameters: epsilon is not positive and finite, or delta is not in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidParameters(f"a budget's epsilon is positive and finite, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise InvalidParameters(f"a budget's delta lies in (0, 1), got {self.delta}")


@dataclass(frozen=True)
class Spent:
    """What a list of events costs: (epsilon, delta) for one device that took part in all of them.

    Attributes:
        epsilon: infinite if any event had no noise.
        delta: the delta at which epsilon holds.
        rounds: how many events.
        sampler_distance: total-variation distance of all noise draws together from the ideal distributions.
        sampler_included: whether delta already holds (1 + e^epsilon) * sampler_distance. It does not fit
            where epsilon is beyond about 40: then the figures are those of the ideal mechanism, and the real
            one can be told from it with an advantage of at most `sampler_distance`.
    """

    epsilon: float
    delta: float
    rounds: int
    sampler_distance: float = 0.0
    sampler_included: bool = True
    unit: str = "device"

    def __str__(self) -> str:
        return f"({self.epsilon:.4g}, {self.delta:g})-DP per {self.unit} after {self.rounds} rounds"


class BudgetExceeded(Exception):
    """A round was refused: it would spend more than the population's budget.

    Attributes:
        projected: what would have been spent with the round.
        budget: the limit.
    """

    def __init__(self, projected: Spent, already: Spent, budget: Budget) -> None:
        super().__init__(
            f"budget gate: with this round epsilon would be {projected.epsilon:.4g} at delta "
            f"{budget.delta:g} after {projected.rounds} rounds; the population's limit is "
            f"{budget.epsilon:.4g}, of which {already.epsilon:.4g} is spent"
        )
        self.projected = projected
        self.budget = budget


class NoiseUnsolvable(InvalidParameters):
    """No noise multiplier reaches the budget with these figures."""


@dataclass(frozen=True)
class RingDpEvent(dp_accounting.DpEvent):  # type: ignore[misc]  # the library has no type stubs
    """Carries one of our events through the library's composition."""

    event: DPEvent


class RingRdpAccountant(rdp.RdpAccountant):  # type: ignore[misc]
    """The library's Renyi accountant, which also knows integer noise in the ring.

    Guarantee: an upper bound on the Renyi divergence at every order, whatever was composed adaptively.
    Assumes: one neighbouring relation for all events: a device's vector is replaced by zeros, or the device
        is added or removed. The bounds are the same, since both move the sum by one clipped vector.
    """

    def __init__(self) -> None:
        super().__init__(ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> object:
        if not isinstance(event, RingDpEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp += count * np.array([renyi_divergence(event.event, order) for order in ORDERS])
        return None


def account(events: Sequence[DPEvent], delta: float) -> Spent:
    """Returns what the events cost together, by Renyi composition.

    The conversion is the library's (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, Proposition 12). The
    noise tables' distance T turns (epsilon, delta) into (epsilon, delta + (1 + e^epsilon) T), by the triangle
    inequality on both neighbouring inputs; that is subtracted from delta first.

    Args:
        events: in any order; from one population.
        delta: in (0, 1).
    """
    if not 0 < delta < 1:
        raise InvalidParameters(f"delta lies in (0, 1), got {delta}")
    accountant = RingRdpAccountant()
    for event, count in Counter(events).items():
        accountant.compose(_library_event(event), count)
    distance = sum(event.shares * event.dimension * event.sampler_distance for event in events)
    epsilon = float(accountant.get_epsilon(delta))
    included = distance == 0
    if not included and epsilon < 700:
        # Half of delta is far more than the tables take below epsilon 40, so that one step is enough.
        reserve = 2 * (1 + math.exp(epsilon)) * distance
        if reserve < delta / 2:
            stricter = float(accountant.get_epsilon(delta - reserve))
            if (1 + math.exp(stricter)) * distance <= reserve:
                epsilon, included = stricter, True
    return Spent(epsilon, delta, len(events), float(distance), included)


def _library_event(event: DPEvent) -> dp_accounting.DpEvent:
    """Maps an event to the library's where it has one."""
    if event.mechanism is Mechanism.NONE:
        return dp_accounting.NonPrivateDpEvent()
    if event.mechanism is Mechanism.DISCRETE_GAUSSIAN and event.shares == 1:
        # Canonne, Kamath, Steinke 2020, arXiv 2004.00010, Theorem 4, and divergences add over coordinates.
        return dp_accounting.ZCDpEvent(event.sensitivity_squared / (2 * event.variance))
    return RingDpEvent(event)


def renyi_divergence(event: DPEvent, order: float) -> float:
    """Bounds the Renyi divergence of order alpha > 1 between neighbouring releases of a noisy integer sum."""
    l2_squared = float(event.sensitivity_squared)
    l1 = min(math.sqrt(event.dimension * l2_squared), l2_squared)  # Cauchy-Schwarz; |x| <= x^2 for integers
    if event.mechanism is Mechanism.SKELLAM:
        nonzeros = min(event.dimension, l2_squared)
        return skellam_divergence(order, l1, l2_squared, nonzeros, event.variance)
    if event.mechanism is Mechanism.DISCRETE_GAUSSIAN:
        return discrete_gaussian_sum_divergence(
            order, l1, l2_squared, event.variance_per_share, event.shares, event.dimension
        )
    return math.inf


def skellam_divergence(order: float, l1: float, l2_squared: float, nonzeros: float, variance: float) -> float:
    """Bounds D_alpha between Skellam noise and the same shifted by an integer vector.

    The least of three bounds, with mu the variance. (a) At integer alpha > 1, alpha Delta_2^2 / (2 mu) +
    min{ ((2 alpha - 1) Delta_2^2 + 6 Delta_1) / (4 mu^2), 3 Delta_1 / (2 mu) } (Agarwal, Kairouz, Liu 2021,
    arXiv 2110.04995, Corollary 3.6). (b) At any alpha > 1,
    alpha M Delta_2^2 / 2 + M Delta_0 / (8 (alpha - 1)), the second term absent at integers, with
    M = `skellam_curvature(mu)`: proved in docs/explanation/privacy.md; it matters where epsilon is large and
    the best alpha is below 2. (c) Between integers, the chord of the above: (alpha - 1) D_alpha is convex in
    alpha and 0 at 1 (van Erven and Harremoes 2014, arXiv 1206.2459, Corollary 2).

    Args:
        order: alpha > 1.
        l1: bound on the L1 norm of the shift.
        l2_squared: bound on its squared L2 norm.
        nonzeros: bound on the number of coordinates that it moves.
        variance: of the noise in the sum, per coordinate; n shares of variance v are one Skellam of n v.
    """
    curvature = skellam_curvature(variance)

    def at(alpha: int) -> float:
        """(alpha - 1) D_alpha at an integer."""
        extra = min(
            ((2 * alpha - 1) * l2_squared + 6 * l1) / (4 * variance**2),
            3 * l1 / (2 * variance),
        )
        published = alpha * l2_squared / (2 * variance) + extra
        return (alpha - 1) * min(published, alpha * curvature * l2_squared / 2)

    below = math.floor(order)
    chord = ((below + 1 - order) * at(below) + (order - below) * at(below + 1)) / (order - 1)
    if below == order:
        return chord
    return min(chord, order * curvature * l2_squared / 2 + curvature * nonzeros / (8 * (order - 1)))


@lru_cache(maxsize=64)
def skellam_curvature(variance: float) -> float:
    """Returns M with p(k)^2 <= e^M p(k - 1) p(k + 1) for every k, p the Skellam probabilities.

    M is the root of 1 / (2 sinh(M / 2)) - ln(tanh(M / 4)) / 2 = variance, about 1 / variance. Proof, by a
    maximum principle for the discrete heat equation, in docs/explanation/privacy.md.
    """
    low, high = 1e-12, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        left = 1 / (2 * math.sinh(middle / 2)) - math.log(math.tanh(middle / 4)) / 2
        low, high = (middle, high) if left > variance else (low, middle)
    return high


def discrete_gaussian_sum_divergence(
    order: float, l1: float, l2_squared: float, local_variance: float, shares: int, dimension: int
) -> float:
    """Bounds D_alpha for the sum of `shares` discrete Gaussians, which is no discrete Gaussian itself.

    With sigma^2 the local variance, n the shares and tau = 10 sum_{k<n} exp(-2 pi^2 sigma^2 k / (k + 1)), the
    minimum of alpha Delta_2^2 / (2 n sigma^2) + tau d,
    alpha / 2 (Delta_2^2 / (n sigma^2) + 2 tau Delta_1 / (sqrt(n) sigma) + tau^2 d) and
    alpha / 2 (Delta_2 / (sqrt(n) sigma) + tau sqrt(d))^2
    (Kairouz, Liu, Steinke 2021, arXiv 2102.06387, Proposition 14). Any m <= n shares may be taken for n,
    since the others are post-processing of their sum; the best m counts, and more survivors never cost more.

    Assumes: sigma >= 1/2 for m > 1, as the theorem does; below it only m = 1 is used.
    """
    counted = np.arange(1, shares + 1 if local_variance >= 0.25 else 2, dtype=np.float64)
    tau = _tau(local_variance, len(counted))
    l2_scale = np.sqrt(l2_squared / (counted * local_variance))
    l1_scale = l1 / np.sqrt(counted * local_variance)
    bounds = (
        order / 2 * l2_scale**2 + tau * dimension,
        order / 2 * (l2_scale**2 + 2 * l1_scale * tau + tau**2 * dimension),
        order / 2 * (l2_scale + tau * math.sqrt(dimension)) ** 2,
    )
    return float(np.min(bounds))


@lru_cache(maxsize=64)
def _tau(local_variance: float, shares: int) -> NDArray[np.float64]:
    """tau for 1 to `shares` shares, float64, shape (shares,)."""
    k = np.arange(shares, dtype=np.float64)
    terms = np.exp(-2 * math.pi**2 * local_variance * k / (k + 1))
    terms[0] = 0.0  # one share is a discrete Gaussian
    tau: NDArray[np.float64] = 10 * np.cumsum(terms)
    return tau


def check_budget(events: Sequence[DPEvent], planned: EncodingParameters, budget: Budget) -> Spent:
    """The budget gate: says what would be spent with one more round, or refuses the round.

    The round is costed at its minimum number of survivors, which is the dearest outcome that it accepts; what
    it really cost is accounted from its own event afterwards. `BudgetExceeded` carries figure and rule.

    Guarantee: if every round passes this gate first, the population's epsilon never exceeds its budget.
    Assumes: `events` holds every release to the population so far.

    Raises:
        BudgetExceeded: the projected epsilon is above the budget's; always so without noise.
    """
    projected = account([*events, event_for(planned, planned.minimum_survivors)], budget.delta)
    if not projected.epsilon <= budget.epsilon:
        raise BudgetExceeded(projected, account(events, budget.delta), budget)
    return projected


def solve_noise_multiplier(
    privacy: PrivacyParameters,
    budget: Budget,
    *,
    rounds: int,
    dimension: int,
    minimum_survivors: int,
    maximum_clients: int,
) -> PrivacyParameters:
    """Finds the least noise that keeps `rounds` rounds within the budget, each device taking part in all.

    Args:
        privacy: everything but the noise multiplier, whose value is replaced.
        budget: epsilon and delta; the result's delta is the budget's.

    Returns:
        The parameters with z rounded up to 10^-4.

    Raises:
        NoiseUnsolvable: a round without noise, no rounds, or a budget that no multiplier reaches.
        RingTooNarrow: the ring cannot hold the noise that the budget needs.
    """
    if rounds < 1:
        raise NoiseUnsolvable(f"need at least one round, got {rounds}")

    def spent_with(steps: int) -> tuple[PrivacyParameters, float]:
        changed = privacy.model_copy(update={"noise_multiplier": steps * _NOISE_GRID, "delta": budget.delta})
        encoding = derive_encoding(
            changed,
            dimension=dimension,
            minimum_survivors=minimum_survivors,
            maximum_clients=maximum_clients,
            rotation_seed=bytes(32),
        )
        return changed, account([event_for(encoding, minimum_survivors)] * rounds, budget.delta).epsilon

    def too_little(steps: int) -> bool:
        try:
            return spent_with(steps)[1] > budget.epsilon
        except RingTooNarrow:
            return False  # noise beyond the ring: the search goes on below it, and the last line decides

    low, high = 0, 1
    while too_little(high):
        low, high = high, 2 * high
        if high * _NOISE_GRID > _MAX_NOISE_MULTIPLIER:
            raise NoiseUnsolvable(
                f"no noise multiplier up to {_MAX_NOISE_MULTIPLIER:g} keeps {rounds} rounds in mode "
                f"{privacy.mode} within epsilon {budget.epsilon:g}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return spent_with(high)[0]


def gaussian_reference(
    noise_multiplier: float,
    *,
    rounds: int,
    delta: float,
    sampling_probability: float = 1.0,
    method: Literal["rdp", "pld"] = "pld",
) -> float:
    """Returns epsilon of the continuous Gaussian mechanism: the yardstick that plans are compared with.

    Assumes: with `sampling_probability` below 1, that every device joins every round by an independent coin,
        hidden from everybody (Poisson sampling). Rounds of real fleets do not meet this: simulation only.
    """
    if sampling_probability == 1 and method == "pld":
        # T Gaussian mechanisms are one with noise z / sqrt(T) (Dong, Roth, Su 2019, arXiv 1905.02383,
        # Corollary 3.3), of which the library knows the closed form.
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(sampling_probability, event)
    accountant = rdp.RdpAccountant() if method == "rdp" else pld.PLDAccountant()
    return float(accountant.compose(event, rounds).get_epsilon(delta))
