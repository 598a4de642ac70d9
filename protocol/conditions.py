"""What a device says of the circumstances that it could train in, so that an operator can choose among them.

Each is optional: a device that does not know, or whose owner does not tell, leaves it out. Nothing here is
measured on data but the size of what there is, and that only as an order of magnitude.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from protocol.fields import Schema

Power = Literal["mains", "battery"]
ExamplesBucket = Literal[0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000]
BUCKETS: tuple[int, ...] = get_args(ExamplesBucket)


class Conditions(Schema):
    """Circumstances of a device when it said so; None is unknown."""

    power: Power | None = None
    battery: Annotated[int, Field(ge=0, le=100)] | None = None
    """Charge in percent."""
    temperature: Annotated[float, Field(ge=-100, le=200)] | None = None
    """Of the processor, degrees Celsius."""
    load: Annotated[float, Field(ge=0, le=10_000)] | None = None
    """Load average of the last minute, for each core."""
    metered: bool | None = None
    """Whether its link costs by the byte."""
    idle_hours: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """Hours since its owner last used it, at most since its start."""
    free_memory: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """MiB that a program could have without swapping."""
    examples: ExamplesBucket | None = None
    """Its examples, as the largest of these numbers that is not above their count."""


def bucket(count: int) -> int:
    """The bucket of a number of examples: all that leaves the device of it.

    Raises:
        ValueError: below 0.
    """
    if count < 0:
        raise ValueError(f"there are no {count} examples")
    return max(edge for edge in BUCKETS if edge <= count)
