"""Renyi divergences of integer noise: what one release can tell, at every order, each from its theorem.

`dp_accounting` lacks sums of discrete Gaussians and Skellam noise. The curves here serve both sides: the
aggregator's accountant composes them through that library, and a device bounds its own epsilon with
`protocol.dp.accounting`, which needs nothing but the standard library and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.dp.events import DPEvent, Mechanism

ORDERS: tuple[float, ...] = (
    *(1 + x / 100 for x in (1.5, 2, 3, 4, 5, 6, 8)),
    *(1 + x / 20 for x in range(2, 40)),
    *(x / 10 for x in range(30, 110)),
    *range(11, 64),
    *(64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024),
)
"""Renyi orders at which curves are evaluated. Epsilon is the minimum over them: each alone is valid."""


def renyi_curve(event: DPEvent) -> tuple[float, ...]:
    """Bounds the Renyi divergences of an event at `ORDERS`, all of its sums together."""
    # Which tree it is makes no difference.
    return _curve(event if event.tree is None else event.model_copy(update={"tree": None}))


@lru_cache(maxsize=256)
def _curve(event: DPEvent) -> tuple[float, ...]:
    if event.mechanism is Mechanism.NONE:
        return (math.inf,) * len(ORDERS)
    if event.sampling_probability < 1:
        curve = sampled_curve(event.sampling_probability, lambda order: renyi_divergence(event, order))
    else:
        curve = tuple(renyi_divergence(event, order) for order in ORDERS)
    return tuple(event.sums * divergence for divergence in curve)


def sampled_curve(probability: float, divergence: Callable[[int], float]) -> tuple[float, ...]:
    """Bounds the Renyi divergences at `ORDERS` of a noisy sum that holds the unit with some probability.

    With symmetric noise P, P_x the same shifted by x, and the mixture M = (1 - q) P + q P_x, at integer n

        e^((n - 1) D_n(M || P)) = sum_k C(n, k) (1 - q)^(n - k) q^k e^((k - 1) D_k(P_x || P)),

    the binomial expansion of the integral of (M / P)^n, with 1 for the terms of k = 0 and 1. The other
    direction, D_n(P || M), is never larger (Mironov, Talwar, Zhang 2019, arXiv 1908.10530, Theorem 5; proved
    for integer noise in docs/explanation/privacy.md). Between integers (alpha - 1) D_alpha lies below its
    chord (van Erven and Harremoes 2014, arXiv 1206.2459, Corollary 2).

    Guarantee: holds for every shift x for which `divergence` does.
    Assumes: the unit is in the sum by a coin that nobody sees, independent of all others.

    Args:
        probability: q, in (0, 1).
        divergence: bound on D_k(P_x || P) for integer k of at least 2.
    """
    most = math.ceil(max(ORDERS))
    counts = np.arange(most + 1)
    costs = np.array([0.0, 0.0, *((k - 1) * divergence(k) for k in range(2, most + 1))])
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])

    def at(order: int) -> float:
        """(n - 1) D_n at an integer."""
        k = counts[: order + 1]
        terms = factorials[order] - factorials[k] - factorials[order - k] + costs[k]
        terms = terms + (order - k) * math.log1p(-probability) + k * math.log(probability)
        largest = float(terms.max())
        return max(0.0, largest + math.log(float(np.exp(terms - largest).sum())))

    def between(order: float) -> float:
        below = math.floor(order)
        if below == order:
            return at(below) / (order - 1)
        return ((below + 1 - order) * at(below) + (order - below) * at(below + 1)) / (order - 1)

    return tuple(between(order) for order in ORDERS)


def renyi_divergence(event: DPEvent, order: float) -> float:
    """Bounds the Renyi divergence of order alpha > 1 between neighbouring releases of one integer sum."""
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
    if curvature == math.inf:
        return math.inf

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

    M is the root of 1 / (2 sinh(M / 2)) - ln(tanh(M / 4)) / 2 = variance, about 1 / variance; infinity where
    it is beyond 1,000, which is as good as no noise. Proof, by a maximum principle for the discrete heat
    equation, in docs/explanation/privacy.md.
    """

    def reached(curvature: float) -> float:
        """The variance at which the bound is `curvature`; it falls as the curvature grows."""
        return 1 / (2 * math.sinh(curvature / 2)) - math.log(math.tanh(curvature / 4)) / 2

    low, high = 1e-12, 1e3
    if reached(high) > variance:
        return math.inf
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) > variance else (low, middle)
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
