"""Gates: what must hold of a version before it goes to more devices."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from protocol.fields import Schema

Metric = Literal["accuracy", "loss", "errors"]
Comparison = Literal[">=", ">", "<=", "<"]

_TEXT = re.compile(r"\s*(accuracy|loss|errors)\s*(>=|>|<=|<)\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*", re.ASCII)
_HOLDS: Mapping[Comparison, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


class InvalidGate(ValueError):
    """A text that is no gate; the message says how one looks."""


class Gate(Schema):
    """A bound on one figure.

    `accuracy` and `loss` are those of the latest federated evaluation of the version: a secure sum. `errors`
    is the share of the wave's devices on which the version failed its self-test, or failed later.
    """

    metric: Metric
    comparison: Comparison
    bound: Annotated[float, Field(ge=0, le=1e9)]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Reads a gate such as `accuracy>=0.8`.

        Raises:
            InvalidGate: it is none, or it would let bad versions pass and stop good ones.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InvalidGate(f"{text!r} is no gate: write accuracy>=0.8, loss<0.5 or errors<0.01")
        metric, comparison, bound = match.groups()
        if (metric == "accuracy") != (comparison in (">", ">=")):
            raise InvalidGate(
                f"{text!r} has the wrong direction: accuracy is > or >=, loss and errors < or <="
            )
        return cls.model_validate({"metric": metric, "comparison": comparison, "bound": float(bound)})

    def holds(self, figure: float) -> bool:
        """Whether a figure passes; one that is no number does not."""
        return _HOLDS[self.comparison](figure, self.bound)

    def __str__(self) -> str:
        """As an operator writes it."""
        return f"{self.metric}{self.comparison}{self.bound:g}"
