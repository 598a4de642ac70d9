"""Who takes part: a cohort drawn from the devices that may."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from protocol.fields import MAX_COHORT, Bytes32, Schema, Slug

MAX_RECORD_BYTES = 2**26


class Selection(Schema):
    """How a cohort was drawn, so that anybody can draw it again.

    Attributes:
        seed: of this draw.
        places: devices to invite, at most.
        pool: who could be chosen, sorted: online, not excluded, in no other round, and fit for the campaign.
        yielding: of them those whose turn was not long ago: they get the places that nobody else takes.
    """

    seed: Bytes32
    places: Annotated[int, Field(ge=1, le=MAX_COHORT)]
    pool: tuple[Slug, ...]
    yielding: tuple[Slug, ...] = ()

    @property
    def chosen(self) -> tuple[str, ...]:
        """The devices that are invited, sorted: they follow from the rest."""
        return select(self.pool, self.places, self.seed, frozenset(self.yielding))

    def to_bytes(self) -> bytes:
        """JSON, compressed: a pool may have tens of thousands of names."""
        return zlib.compress(self.model_dump_json().encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> Selection:
        """Parses `to_bytes`."""
        return cls.model_validate_json(zlib.decompressobj().decompress(data, MAX_RECORD_BYTES))


def select(
    pool: Iterable[str], places: int, seed: bytes, yielding: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Draws up to `places` devices, each subset of that size equally likely where nobody yields.

    The draw depends on the arguments alone: whoever knows them can repeat it.

    Args:
        pool: ids of the devices that may be selected.
        places: how many, at most.
        seed: fresh for each draw.
        yielding: devices that get only the places that the others leave.

    Returns:
        Device ids, sorted.
    """

    def place(device_id: str) -> tuple[bool, bytes]:
        return device_id in yielding, hashlib.sha256(seed + device_id.encode()).digest()

    return tuple(sorted(sorted(pool, key=place)[:places]))


def places(size: int, over_select: float) -> int:
    """How many devices to invite so that `size` of them are quick enough to make the roster."""
    return min(MAX_COHORT, math.ceil(size * over_select))


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
