"""Integer noise by inverse CDF: Skellam and discrete Gaussian, drawn from a ChaCha20 keystream only.

A table holds the cumulative probabilities as 128-bit integers T_0 <= T_1 <= ...; a sample is
low + #{i : T_i <= u} for u uniform on [0, 2^128). The bits of u are drawn lazily: 32 of them decide unless
they equal the top of a threshold, and only then are the other 96 read, from a second stream at the sample's
own position. So a sample is exact to 128 bits at the price of 4 bytes of keystream, and sample i depends on
the key and on i alone: any slice of a noise vector can be drawn by itself.

Probabilities come from integer recurrences, never from floating point (Mironov 2012 shows what floating-point
samplers give away); floats only decide how far out a table reaches.
"""

from __future__ import annotations

import bisect
import decimal
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.dp.errors import InvalidParameters
from protocol.secagg.prg import Keystream, derive_key

MAX_STDDEV = 2.0**16
"""Largest standard deviation that a table is made for; finer quantization would not help any sum."""

_PRECISION = 192  # fractional bits of the discrete Gaussian weights
_START = 1 << 192  # first value of Miller's recurrence, whose relative error is near its inverse
_TAIL_BITS = 131  # a table leaves out at most 2^-131 on either side
_CHUNK = 1 << 14
_WORD_MAX = 0xFFFF_FFFF


@dataclass(frozen=True, eq=False)
class IntegerSampler:
    """Draws integers from one fixed distribution.

    Guarantee: each sample is within total-variation distance `distance` of the distribution named by the
        function that made the table, and samples at different positions are independent.
    Assumes: ChaCha20 keystreams are uniform and every key is used for one noise vector.

    Attributes:
        low: the smallest value.
        distance: bound on the total-variation distance of one sample.
    """

    low: int
    distance: float
    _tops: NDArray[np.uint32]
    """First 32 bits of the thresholds, ascending, then one sentinel; uint32, shape (thresholds + 1,)."""
    _rests: bytes | bytearray
    """The other 96 bits of every threshold, 12 bytes each, big-endian."""
    _guide: NDArray[np.int32]
    """For every value c of the first 16 bits: how many tops lie below c * 2^16, or -1 where two or more tops
    share those bits."""

    def sample(self, key: bytes, start: int, count: int) -> NDArray[np.int32]:
        """Returns samples `start` to `start + count` of the noise vector that `key` defines, int32."""
        words = Keystream(derive_key(key, purpose="dp/noise/words")).words(start, count)
        rests = Keystream(derive_key(key, purpose="dp/noise/rests"))

        def rest(index: int) -> int:
            return int.from_bytes(rests.read(12 * (start + index), 12), "big")

        return self._resolve(words, rest)

    def _resolve(self, words: NDArray[np.uint32], rest: Callable[[int], int]) -> NDArray[np.int32]:
        """Maps first words to samples; `rest(i)` gives the other 96 bits of draw i when they are needed."""
        values = np.empty(words.size, np.int32)
        for start in range(0, words.size, _CHUNK):
            chunk = words[start : start + _CHUNK]
            index = self._guide.take(chunk >> np.uint32(16))
            tops = self._tops.take(index, mode="wrap")
            unclear = np.flatnonzero((chunk == tops) | (index < 0))
            index += chunk >= tops
            if unclear.size:
                index[unclear] = self._search(chunk[unclear], start + unclear, rest)
            np.add(index, self.low, out=values[start : start + _CHUNK])
        return values

    def _search(
        self, words: NDArray[np.uint32], positions: NDArray[np.int64], rest: Callable[[int], int]
    ) -> NDArray[np.int64]:
        """Counts thresholds at or below each draw by bisection, reading further bits only on a tie."""
        tops = self._tops[:-1]
        counts = np.searchsorted(tops, words, side="left")
        upper = np.searchsorted(tops, words, side="right")
        for draw in np.flatnonzero(counts != upper):
            further = rest(int(positions[draw]))
            tied = range(int(counts[draw]), int(upper[draw]))
            counts[draw] += bisect.bisect_right(tied, further, key=self._rest_of)
        return counts

    def thresholds(self) -> list[int]:
        """Returns the whole table, T_0 <= T_1 <= ..., in units of 2^-128; for tests and audits."""
        return [(int(top) << 96) | self._rest_of(index) for index, top in enumerate(self._tops[:-1])]

    def _rest_of(self, threshold: int) -> int:
        return int.from_bytes(self._rests[12 * threshold : 12 * threshold + 12], "big")


def skellam_distance(variance: float) -> float:
    """Returns the `distance` of a Skellam table without making it."""
    _check_variance(variance)
    return _distance(_skellam_reach(variance, _TAIL_BITS * math.log(2)))


def discrete_gaussian_distance(sigma_squared: float) -> float:
    """Returns a bound on the `distance` of a discrete Gaussian table without making it."""
    _check_variance(sigma_squared)
    return _distance(_discrete_gaussian_reach(sigma_squared))


@lru_cache(maxsize=4)
def skellam_sampler(variance: float) -> IntegerSampler:
    """Makes the sampler of the symmetric Skellam distribution: the difference of two Poisson(variance / 2).

    P(k) = e^-v I_|k|(v). The Bessel functions come from Miller's downward recurrence
    I_(k-1)(v) = I_(k+1)(v) + (2k / v) I_k(v) (Abramowitz and Stegun 9.6.26, 9.12) in integers, normalised by
    I_0 + 2 (I_1 + I_2 + ...) = e^v. Sums of independent Skellam variables are Skellam, variances adding
    (Skellam 1946), which is why the clients' shares of noise need no approximation.

    Raises:
        InvalidParameters: the variance is not in (0, 2^32].
    """
    _check_variance(variance)
    # The recurrence starts where probabilities are near 2^-200: what it neglects there dies out inwards.
    last = _skellam_reach(variance, 200 * math.log(2))
    numerator, denominator = variance.as_integer_ratio()

    def weights() -> Iterator[int]:
        above, here = 0, _START
        for k in range(last, 0, -1):
            yield here
            above, here = here, above + 2 * k * denominator * here // numerator
        yield here

    return _sampler(weights, last, _skellam_reach(variance, _TAIL_BITS * math.log(2)))


@lru_cache(maxsize=4)
def discrete_gaussian_sampler(sigma_squared: float) -> IntegerSampler:
    """Makes the sampler of the discrete Gaussian N_Z(0, sigma^2): P(k) proportional to exp(-k^2 / 2 sigma^2).

    (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, Definition 1.) Weights come from the recurrence
    w_(k+1) = w_k g_k, g_(k+1) = g_k exp(-1 / sigma^2) in 192-bit fixed point; the error of w_k is below
    k^2 2^-191.

    Raises:
        InvalidParameters: `sigma_squared` is not in (0, 2^32].
    """
    _check_variance(sigma_squared)
    last = _discrete_gaussian_reach(sigma_squared)
    numerator, denominator = sigma_squared.as_integer_ratio()
    with decimal.localcontext(decimal.Context(prec=80)):
        step = (decimal.Decimal(-denominator) / decimal.Decimal(2 * numerator)).exp()
        ratio = int(step * 2**_PRECISION)
        ratio_step = int(step * step * 2**_PRECISION)
    weights = [1 << _PRECISION]
    for _ in range(last):
        weights.append(weights[-1] * ratio >> _PRECISION)
        ratio = ratio * ratio_step >> _PRECISION
    while not weights[-1]:
        weights.pop()  # below the fixed point: such a value could never be drawn
    last = len(weights) - 1
    return _sampler(lambda: reversed(weights), last, last)


def _check_variance(variance: float) -> None:
    if not 0 < variance <= MAX_STDDEV**2:
        raise InvalidParameters(f"a noise table needs a variance in (0, {MAX_STDDEV**2:.0f}], got {variance}")


def _skellam_reach(variance: float, nats: float) -> int:
    """Returns k with P(|X| >= k) <= 2 e^-nats, by Chernoff: P(X >= k) <= exp(v (cosh t - 1) - k t)."""

    def exponent(k: int) -> float:
        t = math.asinh(k / variance)  # minimises the bound
        return k * t - variance * (math.hypot(1, k / variance) - 1)

    high = 1
    while exponent(high) < nats:
        high *= 2
    return bisect.bisect_left(range(high), nats, key=exponent)


def _discrete_gaussian_reach(sigma_squared: float) -> int:
    # exp(-t^2 / 2) is below 2^-131 from t = 13.5 on; the margin covers the sum over the tail.
    return math.ceil(14 * math.sqrt(sigma_squared)) + 2


def _distance(reach: int) -> float:
    """Bounds the total-variation distance of a table over [-reach, reach].

    2^-130 for the tails beyond, 2^-140 for the weights, and for rounding thresholds down to multiples of
    2^-128 at most 2^-128 for each of the 2 * reach + 1 probabilities, halved.
    """
    return (2 * reach + 3) * 2.0**-129


def _sampler(weights: Callable[[], Iterator[int]], last: int, reach: int) -> IntegerSampler:
    """Builds the tables of a symmetric distribution.

    The weights are gone through twice, for their sum and for the thresholds, rather than kept: as integers of
    400 bits they would take several times the memory of the table, which a small device has to find at once.

    Args:
        weights: begins a walk through the weights at `last`, ..., 1, 0.
        last: the largest value that has a weight.
        reach: the largest value in the table, at most `last`; the lower tail goes to the smallest value and
            the upper to the largest.
    """
    total = at_zero = 0
    for at_zero in weights():
        total += 2 * at_zero
    total -= at_zero
    tops = np.full(2 * reach + 1, _WORD_MAX, np.uint32)
    rests = bytearray(24 * reach)
    tail = 0
    for k, weight in zip(range(last, 0, -1), weights(), strict=False):
        tail += weight  # of all values at or below -k, and at or above k
        if k > reach:
            continue
        lower, remainder = divmod(tail << 128, total)
        upper = (1 << 128) - lower - (remainder > 0)  # the complement's floor
        for index, threshold in ((reach - k, lower), (reach + k - 1, upper)):
            tops[index] = threshold >> 96
            rests[12 * index : 12 * index + 12] = (threshold & (1 << 96) - 1).to_bytes(12, "big")
    prefixes = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    guide = np.searchsorted(tops[:-1], prefixes, side="left").astype(np.int32)
    shared = np.diff(guide, append=np.int32(2 * reach)) > 1
    guide[shared] = -1
    return IntegerSampler(-reach, _distance(reach), tops, rests, guide)
