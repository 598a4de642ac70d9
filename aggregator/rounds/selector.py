"""Which devices a campaign takes: `power=mains,battery>=50,label=site:barn`.

A device fits when it fits every clause. What it did not say of itself fits no clause about it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from aggregator.records import Device
from protocol.conditions import Power
from protocol.fields import Schema

Comparison = Literal[">=", "<=", "!=", ">", "<", "="]
NumberField = Literal["battery", "temperature", "load", "idle_hours", "free_memory", "examples"]
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_CLAUSE = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?P<compare>>=|<=|!=|>|<|=)\s*(?P<value>[^\s,]+)\s*")
_FIELDS = ("power", "metered", *get_args(NumberField), "client", "label")
MAX_CLAUSES = 32


class InvalidSelector(ValueError):
    """A text that is no selector; the message says which part of it."""


class NumberClause(Schema):
    """Compares a figure, such as `battery>=50`."""

    kind: Literal["number"] = "number"
    field: NumberField
    compare: Comparison
    value: Annotated[float, Field(ge=-1e9, le=1e9)]

    def fits(self, device: Device) -> bool:
        """Whether the device said a figure that compares so."""
        said = getattr(device.conditions, self.field)
        return said is not None and _COMPARE[self.compare](said, self.value)

    def __str__(self) -> str:
        return f"{self.field}{self.compare}{self.value:g}"


class PowerClause(Schema):
    """Asks for a source of power, such as `power=mains`."""

    kind: Literal["power"] = "power"
    power: Power

    def fits(self, device: Device) -> bool:
        """Whether the device said that it has this one."""
        return device.conditions.power == self.power

    def __str__(self) -> str:
        return f"power={self.power}"


class MeteredClause(Schema):
    """Asks whether the link costs by the byte, such as `metered=no`."""

    kind: Literal["metered"] = "metered"
    metered: bool

    def fits(self, device: Device) -> bool:
        """Whether the device said so."""
        return device.conditions.metered is self.metered

    def __str__(self) -> str:
        return f"metered={'yes' if self.metered else 'no'}"


class ClientClause(Schema):
    """Compares the version of Covey on the device, such as `client>=0.3`."""

    kind: Literal["client"] = "client"
    compare: Comparison
    version: Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6}){0,3}$")]

    def fits(self, device: Device) -> bool:
        """Whether its version compares so; one that has no numbers does not."""
        said = _numbers(device.client_version)
        return bool(said) and _COMPARE[self.compare](said, _numbers(self.version))

    def __str__(self) -> str:
        return f"client{self.compare}{self.version}"


class LabelClause(Schema):
    """Asks for a label that the operator gave, or for its absence: `label=barn`, `label!=spare`."""

    kind: Literal["label"] = "label"
    label: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._=-]{0,62}$")]
    carried: bool

    def fits(self, device: Device) -> bool:
        """Whether the device carries it, or does not."""
        return (self.label in device.labels) is self.carried

    def __str__(self) -> str:
        return f"label{'=' if self.carried else '!='}{self.label}"


Clause = Annotated[
    NumberClause | PowerClause | MeteredClause | ClientClause | LabelClause, Field(discriminator="kind")
]
Selector = Annotated[tuple[Clause, ...], Field(max_length=MAX_CLAUSES)]


def fits(clauses: Iterable[Clause], device: Device) -> bool:
    """Whether a device fits every clause."""
    return all(clause.fits(device) for clause in clauses)


def written(clauses: Iterable[Clause]) -> str:
    """The text that `parse` makes these clauses of."""
    return ",".join(str(clause) for clause in clauses)


def parse(text: str) -> tuple[Clause, ...]:
    """Reads a selector.

    Args:
        text: clauses with commas between them; `site:barn` is the label `site=barn`. Empty takes everybody.

    Raises:
        InvalidSelector: it says which clause, and what there is.
    """
    clauses = tuple(_clause(part) for part in text.split(",")) if text.strip() else ()
    if len(clauses) > MAX_CLAUSES:
        raise InvalidSelector(f"a selector has at most {MAX_CLAUSES} clauses")
    return clauses


def _clause(text: str) -> Clause:
    found = _CLAUSE.fullmatch(text)
    if found is None:
        raise InvalidSelector(f"{text.strip()!r} is no clause such as power=mains or battery>=50")
    name, compare, value = found["name"], found["compare"], found["value"]
    try:
        if name == "label" and compare in ("=", "!="):
            return LabelClause(label=value.replace(":", "="), carried=compare == "=")
        if name == "power" and compare == "=":
            return PowerClause.model_validate({"power": value})
        if name == "metered" and compare == "=" and value in ("yes", "no"):
            return MeteredClause(metered=value == "yes")
        if name == "client":
            return ClientClause.model_validate({"compare": compare, "version": value})
        if name in get_args(NumberField):
            return NumberClause.model_validate({"field": name, "compare": compare, "value": float(value)})
    except ValidationError as error:
        raise InvalidSelector(f"{text.strip()!r}: {error.errors()[0]['msg']}") from error
    except ValueError as error:
        raise InvalidSelector(f"{text.strip()!r}: {value} is no number") from error
    if name not in _FIELDS:
        raise InvalidSelector(f"{text.strip()!r}: devices say no {name}; they say {', '.join(_FIELDS)}")
    raise InvalidSelector(f"{text.strip()!r} is not what {name} can be compared with")


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]{1,6}(\.[0-9]{1,6})*", version)
    return () if found is None else tuple(int(part) for part in found[0].split("."))
