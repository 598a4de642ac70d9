"""Yardsticks: what the continuous Gaussian would cost, and what TensorFlow Federated would choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import dp_accounting
from dp_accounting import pld, rdp

from protocol.dp.scaling import EncodingParameters

_TFF_DEVIATIONS = 3.890592
"""Standard deviations of a noisy sum that fill TFF's ring: 10^-4 beyond them, for one Gaussian coordinate."""
_TFF_MARGIN = 1e-5  # added to the clip norm for what float rounding may add


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


def tree_reference(noise_multiplier: float, *, rounds: int, restart_every: int, delta: float) -> float:
    """Returns epsilon of DP-FTRL: Gaussian noise z in every node of a binary tree over the rounds.

    The tree restarts after `restart_every` rounds, and epochs compose (Kairouz et al. 2021, arXiv 2103.00039,
    Theorem 4.1 and appendix D.1). Banded matrix factorisations are no event of dp-accounting 0.6.0.

    Assumes: that no device takes part twice before a restart, so that cohorts take turns; and that the server
        keeps tree noise, which Covey's rounds do not: this is a yardstick, for central noise.
    """
    whole, rest = divmod(rounds, restart_every)
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for steps, count in ((restart_every, whole), (rest, 1)):
        if steps and count:
            accountant.compose(
                dp_accounting.SingleEpochTreeAggregationDpEvent(noise_multiplier, steps), count
            )
    return float(accountant.get_epsilon(delta))


def tree_noise_multiplier(*, epsilon: float, rounds: int, restart_every: int, delta: float) -> float:
    """Returns the least z, to 0.1 %, with which DP-FTRL stays within epsilon."""
    low, high = 1e-2, 1e-2
    while tree_reference(high, rounds=rounds, restart_every=restart_every, delta=delta) > epsilon:
        low, high = high, 2 * high
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        enough = tree_reference(middle, rounds=rounds, restart_every=restart_every, delta=delta) <= epsilon
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True)
class TffParameters:
    """What `tff.learning.ddp_secure_aggregator` derives, in quantization steps but for the scale.

    Attributes:
        scale: quantization steps per unit of the parameters.
        scaled_l2: bound on the norm of a rounded vector.
        local_stddev: of one client's noise.
    """

    scale: float
    scaled_l2: float
    local_stddev: float


def tff_parameters(encoding: EncodingParameters) -> TffParameters:
    """Returns TFF 0.87's choice for the same figures, beta 0 and a Hadamard block padded to a power of two.

    2^(2b) = 4 k^2 s^2 (C^2 n^2 / d + n sigma^2) + k^2 n, solved for the scale s, with sigma = z C / sqrt(n)
    the local noise and k = 3.89 (Kairouz, Liu, Steinke 2021, arXiv 2102.06387, section 5, with rho = 1). How
    ours differs is derived in docs/explanation/privacy.md.
    """
    privacy, clients = encoding.privacy, encoding.minimum_survivors
    padded = 2 ** math.ceil(math.log2(encoding.dimension)) if encoding.dimension > 1 else 1
    local = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(clients)
    spread = privacy.clip_norm**2 * clients**2 / padded + clients * local**2
    room = 2.0 ** (2 * privacy.bits) - clients * _TFF_DEVIATIONS**2
    scale = math.sqrt(room / (4 * _TFF_DEVIATIONS**2 * spread))
    scaled_l2 = scale * (privacy.clip_norm + _TFF_MARGIN) + math.sqrt(padded)
    return TffParameters(scale, scaled_l2, scale * local)
