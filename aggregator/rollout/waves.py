"""Who is in which wave: a seeded order of the pool, of which each wave is a longer beginning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable


def ordered(pool: Iterable[str], seed: bytes) -> tuple[str, ...]:
    """The pool in the order in which its devices get the version: by SHA-256 of seed and device id.

    The order follows from what a rollout records, so that anybody can work it out again.
    """
    return tuple(sorted(pool, key=lambda device_id: hashlib.sha256(seed + device_id.encode()).digest()))


def reach(size: int, percent: float) -> int:
    """How many devices of a pool a wave reaches: at least one, and the whole pool at 100 percent."""
    return min(size, max(1, math.ceil(size * percent / 100 - 1e-9)))
