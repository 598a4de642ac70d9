"""Chooses scale, ring sensitivity and noise together, from what a plan declares about a round.

The client works in quantization steps: its clipped vector (update and metric slots) has L2 norm at most
`radius` steps, an integer. From the radius follow, in this order, the squared integer sensitivity after
conditional rounding (`protocol.dp.rounding`), the noise variance z^2 times it, and a bound on the probability
that any coordinate of the sum leaves [-2^(b-1), 2^(b-1)). The largest radius that keeps this bound is taken:
it makes rounding least harmful. Since sensitivity includes the rounding, the noise multiplier z that the plan
names is the one that the accountant sees; nothing is lost in between.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace

from protocol.dp.errors import CohortTooSmall, InvalidParameters, RingTooNarrow
from protocol.dp.parameters import NoiseDistribution, PrivacyMode, PrivacyParameters
from protocol.dp.rotation import variance_proxy
from protocol.dp.rounding import BETA, rounded_norm_bound_squared
from protocol.ring import MAX_BITS, cannot_overflow

OVERFLOW_PROBABILITY = 2.0**-20
"""Default bound on the probability that any coordinate of one round's sum overflows."""

MAX_RADIUS = 1 << 22
"""Beyond it float32 updates hold no further information, and float64 sums of squares stay exact."""

MAX_LOCAL_STDDEV = 2.0**12
"""A device's noise table for it takes 2 MB and a twentieth of a second; finer steps would gain nothing."""

MAX_CENTRAL_STDDEV = 2.0**16


@dataclass(frozen=True)
class EncodingParameters:
    """All that encoding and decoding one round need; equal on every machine that derives it from one plan.

    Attributes:
        privacy: the plan's privacy section.
        dimension: d, elements of the update.
        minimum_survivors: fewest masked inputs that the sum may hold; the noise is sized for it.
        maximum_clients: most masked inputs that the sum may hold; the ring is sized for it.
        rotation_seed: public seed of the rotation.
        radius: L2 bound of the clipped vector, in quantization steps.
        norm_bound_squared: squared L2 norm that no rounded vector exceeds: the squared integer sensitivity.
        local_variance: variance of each client's noise share per coordinate, in squared steps; 0 where the
            clients add none.
        central_variance: variance of the aggregator's noise per coordinate, in squared steps (central); of
            one node, where the noise is that of a tree.
        overflow_probability: bound on the probability that any coordinate of the round's sum overflows.
    """

    privacy: PrivacyParameters
    dimension: int
    minimum_survivors: int
    maximum_clients: int
    rotation_seed: bytes
    radius: int
    norm_bound_squared: int
    local_variance: float
    central_variance: float
    overflow_probability: float

    @property
    def bits(self) -> int:
        """Width of the ring."""
        return self.privacy.bits

    @property
    def central_draws(self) -> int:
        """How many draws of `central_variance` one release may hold: new nodes of a tree less old ones."""
        return 1 if self.privacy.tree is None else 2 * self.privacy.tree.height

    @property
    def length(self) -> int:
        """Elements of the ring vector: the update, then one for each slot."""
        return self.dimension + len(self.privacy.slots)

    @property
    def total_clip_norm(self) -> float:
        """L2 bound of update and metric slots together, in the unit of the parameters."""
        return total_clip_norm(self.privacy)

    @property
    def scale(self) -> float:
        """Quantization steps per unit of the parameters."""
        return self.radius / self.total_clip_norm


def total_clip_norm(privacy: PrivacyParameters) -> float:
    """Returns C sqrt(1 + sum of share^2), the L2 bound of update and metric slots together."""
    return privacy.clip_norm * math.sqrt(1 + sum(slot.share**2 for slot in privacy.slots))


def derive_encoding(
    privacy: PrivacyParameters,
    *,
    dimension: int,
    minimum_survivors: int,
    maximum_clients: int,
    rotation_seed: bytes,
    overflow_probability: float = OVERFLOW_PROBABILITY,
) -> EncodingParameters:
    """Derives the encoding of a round from (C, z, minimum survivors, d, b) before any data is touched.

    The radius is the largest integer up to 2^22 for which the noise fits its tables and the bound of
    `overflow_bound` is at most `overflow_probability`. Without noise that bound is 0 or 1: overflow is then
    impossible, by the proof in `protocol.ring`. TFF's heuristic allows 10^-4 per coordinate if the sum is
    Gaussian; this bound is for a whole round, and rigorous even where all clients send one vector.

    Guarantee: with at least `minimum_survivors` of which at most `privacy.colluders` reveal their noise, the
        noise in the sum has a standard deviation of at least z times the integer sensitivity; in local mode
        the noise in every client's own vector has.

    Args:
        dimension: d >= 1.
        minimum_survivors: fewest inputs in the sum; above `privacy.colluders`.
        maximum_clients: most inputs in the sum.
        rotation_seed: public, 16 to 64 bytes; a digest of the plan serves.
        overflow_probability: in (0, 1), for a whole round.

    Raises:
        CohortTooSmall: it cannot give the survivors that a sum needs.
        InvalidParameters: other figures that make no round.
        RingTooNarrow: no radius fits; says which width would.
    """
    if dimension < 1:
        raise InvalidParameters(f"an update has at least one element, got {dimension}")
    if not privacy.colluders < minimum_survivors <= maximum_clients:
        raise CohortTooSmall(
            f"need colluders < minimum survivors <= maximum clients, "
            f"got {privacy.colluders}, {minimum_survivors}, {maximum_clients}"
        )
    if not 0 < overflow_probability < 1:
        raise InvalidParameters(f"an overflow probability lies in (0, 1), got {overflow_probability}")
    if not 16 <= len(rotation_seed) <= 64:
        raise InvalidParameters(f"a rotation seed has 16 to 64 bytes, got {len(rotation_seed)}")

    def candidate(radius: int, bits: int) -> EncodingParameters:
        bound = rounded_norm_bound_squared(radius, dimension + len(privacy.slots))
        variance = privacy.noise_multiplier**2 * bound
        sharers = {PrivacyMode.DISTRIBUTED: minimum_survivors - privacy.colluders, PrivacyMode.LOCAL: 1}
        shares = sharers.get(privacy.mode)
        parameters = EncodingParameters(
            privacy=privacy.model_copy(update={"bits": bits}),
            dimension=dimension,
            minimum_survivors=minimum_survivors,
            maximum_clients=maximum_clients,
            rotation_seed=rotation_seed,
            radius=radius,
            norm_bound_squared=bound,
            local_variance=variance / shares if shares else 0.0,
            central_variance=variance if privacy.mode is PrivacyMode.CENTRAL else 0.0,
            overflow_probability=0.0,
        )
        return replace(parameters, overflow_probability=overflow_bound(parameters))

    def unfit(radius: int, bits: int = privacy.bits) -> bool:
        parameters = candidate(radius, bits)
        return (
            parameters.local_variance > MAX_LOCAL_STDDEV**2
            or parameters.central_variance > MAX_CENTRAL_STDDEV**2
            or parameters.overflow_probability > overflow_probability
        )

    radius = bisect.bisect_left(range(1, MAX_RADIUS + 1), True, key=unfit)
    if radius == 0:
        wider = [bits for bits in range(privacy.bits + 1, MAX_BITS + 1) if not unfit(1, bits)]
        hint = f"{wider[0]} bits would do" if wider else "no ring is wide enough: lower the noise multiplier"
        raise RingTooNarrow(
            f"{privacy.bits} bits cannot hold the sum of {maximum_clients} clients of {dimension} elements "
            f"at noise multiplier {privacy.noise_multiplier}; {hint}"
        )
    return candidate(radius, privacy.bits)


def overflow_bound(parameters: EncodingParameters) -> float:
    """Bounds the probability that any coordinate of the sum of `maximum_clients` inputs overflows.

    Two bounds hold, and the smaller is returned. (a) Signal and rounding stay within maximum_clients * radius
    for certain, and only the noise has a tail. (b) With rotation, the summed signal, of norm at most
    maximum_clients * radius, is sub-Gaussian in every coordinate (`protocol.dp.rotation`), and so are the
    rounding errors, each in an interval of length 1 (Hoeffding's lemma: variance proxy 1/4); conditioning on
    the norm bound raises a probability by at most (1 - beta)^-n. Tails are Chernoff bounds with the noise's
    own moment generating function; a union bound joins the coordinates and the two sides.
    """
    clients, limit = parameters.maximum_clients, 2 ** (parameters.bits - 1)
    log_union = math.log(2 * parameters.length)
    noise = parameters.central_draws * parameters.central_variance + clients * parameters.local_variance
    skellam = parameters.privacy.noise is NoiseDistribution.SKELLAM
    certain = clients * parameters.radius
    if noise == 0:
        return 0.0 if cannot_overflow(clients, parameters.radius, parameters.bits) else 1.0
    bounds = [0.0]
    if certain < limit:
        bounds.append(log_union + _log_chernoff(limit - certain, 0.0, noise, skellam=skellam))
    if parameters.privacy.rotation:
        proxy = certain**2 * variance_proxy(parameters.length) + clients / 4
        condition = -clients * math.log1p(-BETA)
        bounds.append(condition + log_union + _log_chernoff(limit, proxy, noise, skellam=skellam))
    return math.exp(min(bounds))


def _log_chernoff(threshold: float, proxy: float, noise_variance: float, *, skellam: bool) -> float:
    """Bounds log P(G + N >= threshold): the minimum over t > 0 of log E e^(t (G + N)) - t * threshold.

    G is sub-Gaussian with variance proxy `proxy`. N is Skellam, log E e^(tN) = v (cosh t - 1), or a sum of
    discrete Gaussians, log E e^(tN) <= v t^2 / 2: complete the square, and note that by Poisson summation
    the sum of e^(-(k - x)^2 / 2 sigma^2) over all integers k is largest at integer x.
    """

    def exponent(t: float) -> float:
        # 2 sinh^2(t/2) = cosh t - 1 without cancellation
        noise = 2 * math.sinh(t / 2) ** 2 if skellam else t * t / 2
        return proxy * t * t / 2 + noise_variance * noise - t * threshold

    def slope(t: float) -> float:
        return proxy * t + noise_variance * (math.sinh(t) if skellam else t) - threshold

    low, high = 0.0, threshold / (proxy + noise_variance)  # sinh t >= t, so the minimum is not above `high`
    high = min(high, math.asinh(threshold / noise_variance)) if skellam else high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return exponent(low)
