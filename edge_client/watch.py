"""Looks at the device's circumstances for the daemon, and lets training go on only where its owner does."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_client.adapters.surroundings import Surroundings
from edge_client.conditions import unmet, worth_telling
from edge_client.configuration import ConditionLimits
from edge_client.events import Fault
from edge_client.pausing import Gate
from protocol.conditions import Conditions, bucket


def minute_of_day() -> int:
    """Minutes since midnight on the owner's clock."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


class Watch:
    """What the daemon knows of its surroundings."""

    def __init__(
        self,
        surroundings: Surroundings,
        limits: ConditionLimits,
        gate: Gate,
        minute: Callable[[], int] = minute_of_day,
    ) -> None:
        """Puts the parts together.

        Args:
            surroundings: where the circumstances are read.
            limits: the owner's.
            gate: of the worker; closed while a limit is broken.
            minute: of the local day.
        """
        self._surroundings, self._limits, self._gate, self._minute = surroundings, limits, gate, minute
        self._now = self._told = Conditions()
        self._told_at = -1e9

    def look(self, *, training: bool, examples: int | None = None) -> Fault | None:
        """Reads the circumstances; returns what keeps the device from training now, and holds training there.

        Args:
            training: whether the worker trains, which the load shows.
            examples: how many the last training had.
        """
        self._now = self._surroundings.read()
        if examples is not None:
            self._now = self._now.model_copy(update={"examples": bucket(examples)})
        own = 1 / self._surroundings.cores() if training else 0.0
        fault = unmet(self._limits, self._now, self._minute(), own)
        self._gate.set(fault)
        return fault

    def tell(self, steady: float) -> Conditions:
        """What the operator is told now."""
        self._told, self._told_at = self._now, steady
        return self._now if self._limits.tell else Conditions()

    def news(self, steady: float) -> bool:
        """Whether the operator should be told again."""
        return self._limits.tell and worth_telling(self._told, self._now, steady - self._told_at)
