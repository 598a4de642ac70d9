"""The fields of this device: numbers that its owner lets queries ask for, and where each comes from.

Nothing is answered unless it is declared here. A field gives one value per device; where its source has
several readings, the owner says how they become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from protocol.fields import Slug

MAX_FIELDS = 64
Summary = Literal["last", "mean", "median", "min", "max", "sum"]

_SUMMARIES: Final[Mapping[Summary, Callable[[Sequence[float]], float]]] = MappingProxyType(
    {
        "last": lambda readings: readings[-1],
        "mean": lambda readings: math.fsum(readings) / len(readings),
        "median": lambda readings: _median(sorted(readings)),
        "min": min,
        "max": max,
        "sum": sum,
    }
)


class InvalidFields(ValueError):
    """A file of fields that is none."""


class UnreadableField(Exception):
    """A declared field whose source gives no number now; the message says why, and holds no reading."""


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


_Scale = Annotated[float, Field(ge=-1e12, le=1e12)]


class ConstantSource(_Source):
    """A number that the owner wrote down."""

    kind: Literal["constant"] = "constant"
    value: Annotated[float, Field(allow_inf_nan=False)]


class FileSource(_Source):
    """Numbers in a text file, as the kernel's sensors give them, or some program of the owner's."""

    kind: Literal["file"] = "file"
    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/")]
    scale: _Scale = 1.0
    """What a reading is multiplied by: 0.001 for the millidegrees of a thermal zone."""
    summary: Summary = "last"


class RecordingSource(_Source):
    """The recordings in the data directory: one reading for each NPZ file, its number of examples."""

    kind: Literal["recordings"] = "recordings"
    scale: _Scale = 1.0
    """What a reading is multiplied by: the seconds of one example make a length of it."""
    summary: Summary = "sum"


FieldSource = Annotated[ConstantSource | FileSource | RecordingSource, Field(discriminator="kind")]


_SOURCE: TypeAdapter[FieldSource] = TypeAdapter(FieldSource)


def field_source(given: Mapping[str, object]) -> FieldSource:
    """Makes a source of what its owner gave.

    Raises:
        InvalidFields: no such source can be.
    """
    try:
        return _SOURCE.validate_python(given)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> InvalidFields:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return InvalidFields(f"{where or 'fields'}: {first['msg']}")


class DeclaredFields(BaseModel):
    """What queries may ask this device for."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    fields: Annotated[dict[Slug, FieldSource], Field(max_length=MAX_FIELDS, default_factory=dict)]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parses a file of fields.

        Raises:
            InvalidFields: not JSON, an unknown source or a name that no query can ask for.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise _invalid(error) from error

    def to_bytes(self) -> bytes:
        """The fields as a file that their owner can edit."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    def declare(self, name: str, source: FieldSource) -> DeclaredFields:
        """The fields with one more, or with another source for one.

        Raises:
            InvalidFields: a name that no query can ask for, or too many fields.
        """
        declared = self.model_copy(update={"fields": {**self.fields, name: source}})
        return DeclaredFields.from_bytes(declared.to_bytes())

    def withdraw(self, name: str) -> DeclaredFields:
        """The fields without one.

        Raises:
            InvalidFields: it is not declared.
        """
        if name not in self.fields:
            raise InvalidFields(f"no field {name} is declared: see `covey-edge fields`")
        return DeclaredFields(fields={other: s for other, s in self.fields.items() if other != name})


def _median(ordered: Sequence[float]) -> float:
    # Not from `statistics`, which would take a device two megabytes for good.
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else ordered[half - 1] / 2 + ordered[half] / 2


def summarise(readings: Sequence[float], summary: Summary, scale: float) -> float:
    """One value of several readings.

    Raises:
        UnreadableField: there are no readings.
    """
    if not readings:
        raise UnreadableField("the source holds no number")
    try:
        return scale * _SUMMARIES[summary](readings)
    except OverflowError:
        return math.inf
