"""Splitting a cohort that is too large for one graph into sub-cohorts, whose sums are added.

Every sub-cohort has its own roster, graph, threshold, survivor set and unmasking, so that one that fails, or
is attacked, does not stop the others, and no client's work depends on the whole cohort's size.

What it reveals. The aggregator learns the sum of each sub-cohort, not only the total. So

- a client hides among its sub-cohort's survivors: the plan's `minimum` and `minimum_survivors` hold for each;
- the noise of a sum must be enough for each sub-cohort by itself. With s sub-cohorts the total carries up to
s
  times the variance that one round over the whole cohort would need: that is the price, in accuracy;
- the corrupt fraction of a sub-cohort differs from the cohort's. `most_marked` says by how much at most: the
  graph of a sub-cohort is sized for that fraction.

Who is with whom. A device's sub-cohort follows from a seed and its own name alone, so that a client can check
its own place and that of everybody it sees, without knowing the rest of the cohort; the price are sizes that
differ. The seed must not be known when devices are chosen, or a selector could gather corrupt devices around
a victim: it is the hash of the signed plan. Whoever signs plans could try many, so this guards against the
aggregator that selects and not against the signer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, floor, log, sqrt
from typing import Self

from protocol.secagg.parameters import ETA, SIGMA, GraphAssumptions, NoGraph, log_hypergeometric


@dataclass(frozen=True)
class Split:
    """How a cohort falls into sub-cohorts.

    Attributes:
        cohort: devices in all, at most.
        count: sub-cohorts; 1 leaves the cohort whole.
    """

    cohort: int
    count: int = 1

    @classmethod
    def of(cls, cohort: int, limit: int) -> Self:
        """The fewest sub-cohorts that have at most `limit` devices on average."""
        return cls(cohort, -(-cohort // limit))

    @property
    def average(self) -> int:
        """Devices of a sub-cohort on average, rounded down."""
        return self.cohort // self.count

    @property
    def largest(self) -> int:
        """Devices that no sub-cohort exceeds, but with probability 2^-ETA.

        A size is a sum of independent indicators, one a device (Bernstein's inequality, and a union bound).
        """
        if self.count == 1:
            return self.cohort
        mean, exponent = self.cohort / self.count, ETA * log(2) + log(self.count)
        return min(self.cohort, floor(mean + exponent / 3 + sqrt(exponent**2 / 9 + 2 * exponent * mean)))

    def number_of(self, device_id: str, seed: bytes) -> int:
        """The sub-cohort of a device, below `count`.

        Args:
            device_id: the device.
            seed: 32 bytes that were not known when the devices were chosen: the hash of the signed plan.
        """
        digest = hashlib.sha256(b"covey/v1/sub-cohort" + seed + device_id.encode()).digest()
        return int.from_bytes(digest[:16], "big") % self.count

    def parts(self, devices: Iterable[str], seed: bytes) -> tuple[tuple[str, ...], ...]:
        """The devices of each sub-cohort, ascending; every device is in exactly one."""
        parts: list[list[str]] = [[] for _ in range(self.count)]
        for device_id in sorted(devices):
            parts[self.number_of(device_id, seed)].append(device_id)
        return tuple(tuple(part) for part in parts)

    def assumptions(self, size: int, whole: GraphAssumptions) -> GraphAssumptions:
        """What holds for a sub-cohort of `size` when `whole` holds for the cohort.

        Raises:
            NoGraph: a third or more of so small a sub-cohort may be corrupt.
        """
        if self.count == 1:
            return whole
        corrupt = most_marked(self.cohort, whole.corrupt_fraction, size, SIGMA)
        dropped = most_marked(self.cohort, whole.dropout_fraction, size, ETA)
        if 3 * corrupt >= size:
            raise NoGraph(
                f"{corrupt} of a sub-cohort of {size} may be corrupt: a third is too many, "
                "so make sub-cohorts larger"
            )
        # Half a client more, so that the fraction times the size is not rounded below the count.
        return whole.model_copy(
            update={
                "corrupt_fraction": (corrupt + 0.5) / size,
                "dropout_fraction": min((dropped + 0.5) / size, 1 - 0.5 / size),
            }
        )


WHOLE = Split(1)
"""A cohort that is one."""


@lru_cache(maxsize=256)
def most_marked(cohort: int, fraction: float, size: int, bits: int = SIGMA) -> int:
    """How many marked devices no sub-cohort exceeds, but with probability 2^-bits.

    Given its size, a sub-cohort is a uniform sample of the cohort, so its marked members are hypergeometric;
    a union bound covers the sub-cohorts.

    Args:
        cohort: devices in all.
        fraction: of them that is marked: corrupt, or dropping out.
        size: devices of the sub-cohort, at most `cohort`.
        bits: of security, or correctness.
    """
    marked = floor(fraction * cohort)
    allowed = 2.0**-bits / ceil(cohort / size)
    tail = 0.0
    for count in range(min(marked, size), -1, -1):
        tail += exp(log_hypergeometric(cohort, marked, size, count))
        if tail > allowed:
            return count
    return 0
