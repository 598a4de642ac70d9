"""Who takes part: a cohort drawn from the devices that are online."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def select(online: Iterable[str], size: int, seed: bytes) -> tuple[str, ...]:
    """Draws up to `size` devices, each subset of that size equally likely.

    The draw depends on the seed and the names alone: whoever knows both can repeat it.

    Args:
        online: ids of the devices that may be selected.
        size: how many, at most.
        seed: fresh for each draw.

    Returns:
        Device ids, sorted.
    """
    drawn = sorted(online, key=lambda device_id: hashlib.sha256(seed + device_id.encode()).digest())
    return tuple(sorted(drawn[:size]))


def ready(online: int, *, minimum: int, size: int, waited: float, patience: float) -> bool:
    """Whether a round starts now: with a full cohort at once, with the minimum after some patience.

    Args:
        online: devices that may be selected.
        minimum: of a cohort.
        size: of a full cohort.
        waited: seconds since the minimum was there.
        patience: seconds to wait for a full cohort.
    """
    return online >= size or (online >= minimum and waited >= patience)
