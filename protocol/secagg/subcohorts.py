"""Splitting a cohort that is too large for one graph into sub-cohorts, whose sums are added.

Every sub-cohort is a round of its own: its own roster, graph, threshold and survivor set, so that one that
fails, or is attacked, does not stop the others, and no client's work depends on the whole cohort's size.

What it reveals. The aggregator learns the sum of each sub-cohort, not only the total. So

- a client hides among its sub-cohort's survivors: the plan's `minimum_survivors` holds for each of them;
- the noise of a sum must be enough for each sub-cohort by itself. With s sub-cohorts the total carries s
  times the variance that one round over the whole cohort would need: that is the price, in accuracy;
- the corrupt fraction of a sub-cohort differs from the cohort's. `corrupt_fraction_bound` says by how much at
  most: the graph of a sub-cohort is sized for that fraction.

Who is with whom follows from a seed and the device ids. The seed must not be known when devices are chosen,
or a selector could gather corrupt devices around a victim: it is the hash of the signed plan. Whoever signs
plans could try many, so this guards against the aggregator that selects and not against the signer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from math import ceil, exp, floor, lgamma

from protocol.secagg.parameters import SIGMA


def sub_cohorts(devices: Collection[str], seed: bytes, limit: int) -> tuple[tuple[str, ...], ...]:
    """Splits a cohort into the fewest sub-cohorts of at most `limit`, of sizes that differ by at most one.

    Args:
        devices: device ids, without repeats.
        seed: 32 bytes that were not known when the devices were chosen.
        limit: the largest sub-cohort, at least 2.

    Returns:
        The device ids of each sub-cohort, ascending; every device is in exactly one.

    Raises:
        ValueError: a repeated device, or a limit below 2.
    """
    if limit < 2 or len(set(devices)) != len(devices):
        raise ValueError(f"cannot split {len(devices)} devices into sub-cohorts of {limit}")
    order = sorted(devices, key=lambda device: _place(seed, device))
    count = -(-len(order) // limit)
    return tuple(tuple(sorted(order[i::count])) for i in range(count))


def _place(seed: bytes, device: str) -> bytes:
    return hashlib.sha256(b"covey/v1/sub-cohort" + seed + device.encode()).digest()


def corrupt_fraction_bound(cohort: int, corrupt_fraction: float, size: int, *, bits: int = SIGMA) -> float:
    """The corrupt fraction that no sub-cohort exceeds, but with probability 2^-bits.

    A sub-cohort is a uniform sample of the cohort, so its corrupt members are hypergeometric; a union bound
    covers the sub-cohorts.

    Args:
        cohort: devices in all.
        corrupt_fraction: gamma of the whole cohort.
        size: devices of the smallest sub-cohort.
        bits: of security.
    """
    corrupt = floor(corrupt_fraction * cohort)
    allowed = 2.0**-bits / ceil(cohort / size)
    tail = 0.0
    for count in range(min(corrupt, size), -1, -1):
        tail += _hypergeometric(cohort, corrupt, size, count)
        if tail > allowed:
            return count / size
    return 0.0


def _hypergeometric(population: int, marked: int, drawn: int, count: int) -> float:
    if drawn - count > population - marked:
        return 0.0
    return exp(
        _log_choose(marked, count)
        + _log_choose(population - marked, drawn - count)
        - _log_choose(population, drawn)
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
