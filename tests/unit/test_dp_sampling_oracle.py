"""The noise tables against analytic probabilities, by comparison of every entry and by chi-squared tests.

The chi-squared tests draw from fixed keys. Each has a false-alarm rate of 10^-6: a correct sampler with a key
drawn anew would fail it once in a million runs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from protocol.dp.sampling import discrete_gaussian_sampler, skellam_sampler

mpmath = pytest.importorskip("mpmath")
stats = pytest.importorskip("scipy.stats")

FALSE_ALARM_RATE = 1e-6
VARIANCES = [0.05, 0.25, 1.0, 9.0, 900.0, 12345.678]


def skellam_probability(k: int, variance: float) -> Any:
    """e^-v I_|k|(v), to the working precision of mpmath."""
    return mpmath.exp(-mpmath.mpf(variance)) * mpmath.besseli(abs(k), mpmath.mpf(variance))


def discrete_gaussian_probability(k: int, sigma_squared: float) -> Any:
    """exp(-k^2 / 2 sigma^2), normalised by the sum over all integers."""
    return mpmath.exp(-k * k / (2 * mpmath.mpf(sigma_squared))) / _theta(sigma_squared, mpmath.mp.dps)


@functools.cache
def _theta(sigma_squared: float, digits: int) -> Any:
    reach = int(math.sqrt(2 * sigma_squared * digits * math.log(10))) + 2
    half = sum(mpmath.exp(-k * k / (2 * mpmath.mpf(sigma_squared))) for k in range(1, reach))
    return 1 + 2 * half


ORACLES = {"skellam": skellam_probability, "discrete_gaussian": discrete_gaussian_probability}
SAMPLERS = {"skellam": skellam_sampler, "discrete_gaussian": discrete_gaussian_sampler}


@pytest.mark.parametrize("variance", [0.01, 1.0, 900.0, 10_000.0])
@pytest.mark.parametrize("name", sorted(ORACLES))
def test_tables_hold_the_analytic_probabilities(name: str, variance: float) -> None:
    sampler = SAMPLERS[name](variance)
    edges = [0, *sampler.thresholds(), 1 << 128]
    assert edges == sorted(edges)
    stddev = max(1, math.isqrt(int(variance)))
    with mpmath.workdps(60):
        centre = range(max(-3, sampler.low), min(3, -sampler.low) + 1)
        for k in [*centre, *range(0, -sampler.low + 1, max(1, stddev // 2)), sampler.low, -sampler.low]:
            index = k - sampler.low
            got = mpmath.mpf(edges[index + 1] - edges[index]) / 2**128
            assert abs(got - ORACLES[name](k, variance)) < mpmath.mpf(2) ** -127


@pytest.mark.parametrize("variance", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("name", sorted(ORACLES))
def test_the_stated_distance_covers_the_true_one(name: str, variance: float) -> None:
    sampler = SAMPLERS[name](variance)
    edges = [0, *sampler.thresholds(), 1 << 128]
    with mpmath.workdps(60):
        differences = mpmath.mpf(0)
        inside = mpmath.mpf(0)
        for index in range(len(edges) - 1):
            probability = ORACLES[name](sampler.low + index, variance)
            inside += probability
            differences += abs(mpmath.mpf(edges[index + 1] - edges[index]) / 2**128 - probability)
        distance = (differences + (1 - inside)) / 2
        assert distance <= sampler.distance < 2**-60


def chi_squared(samples: np.ndarray, name: str, variance: float) -> float:
    """p-value of the samples against the analytic probabilities; cells expect at least 20 each."""
    reach = int(np.abs(samples).max()) + 1
    values = np.arange(-reach, reach + 1)
    with mpmath.workdps(30):
        probabilities = np.array([float(ORACLES[name](int(k), variance)) for k in range(reach + 1)])
    expected = samples.size * probabilities[np.abs(values)]
    observed = np.bincount(samples.astype(np.int64) + reach, minlength=values.size)
    dense = expected >= 20
    cells = np.append(observed[dense], samples.size - observed[dense].sum())
    means = np.append(expected[dense], samples.size - expected[dense].sum())
    if means[-1] < 20:  # the rest is too thin for a cell of its own
        cells, means = np.append(cells[:-2], cells[-2:].sum()), np.append(means[:-2], means[-2:].sum())
    return float(stats.chi2.sf(((cells - means) ** 2 / means).sum(), df=len(cells) - 1))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", sorted(ORACLES))
def test_samples_follow_the_distribution(name: str, variance: float) -> None:
    samples = SAMPLERS[name](variance).sample(bytes(range(32)), 0, 400_000)
    assert chi_squared(samples, name, variance) > FALSE_ALARM_RATE


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_the_chi_squared_test_can_fail(name: str) -> None:
    samples = SAMPLERS[name](9.0).sample(bytes(range(32)), 0, 400_000)
    assert chi_squared(samples, name, 9.3) < FALSE_ALARM_RATE
    other = "skellam" if name == "discrete_gaussian" else "discrete_gaussian"
    assert chi_squared(samples, other, 9.0) < FALSE_ALARM_RATE


def test_sums_of_shares_follow_the_skellam_of_the_summed_variance() -> None:
    shares = [skellam_sampler(2.5).sample(bytes([client]) * 32, 0, 200_000) for client in range(8)]
    assert chi_squared(np.sum(shares, axis=0), "skellam", 20.0) > FALSE_ALARM_RATE
