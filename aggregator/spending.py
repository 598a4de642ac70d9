"""What the fleet's devices have spent in privacy, and the gate in front of a round.

The accountant is imported when a figure is needed: it takes half a second and 50 MB that a command, or a
service whose rounds add no noise, has no use for.
"""

from __future__ import annotations

import math

from pydantic import TypeAdapter

from aggregator.repository import Reader
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.mechanism import EncodingParameters

_EVENT: TypeAdapter[DPEvent] = TypeAdapter(DPEvent)


class BudgetRefused(Exception):
    """A round that would spend more than the fleet may; the message has the figures."""


def spent_events(reader: Reader) -> list[DPEvent]:
    """Every release so far, of all models: they all say something about the same devices."""
    return [_EVENT.validate_json(entry.event) for entry in reader.ledger()]


def epsilon_of(events: list[DPEvent], delta: float) -> float | None:
    """What the events cost together; None when nothing is promised."""
    if any(event.mechanism is Mechanism.NONE for event in events):
        return None
    if not events:
        return 0.0
    from aggregator.privacy import account

    epsilon = account(events, delta).epsilon
    return epsilon if math.isfinite(epsilon) else None


def check_limit(events: list[DPEvent], planned: EncodingParameters, limit: float) -> None:
    """The budget gate: refuses a round that would take the fleet beyond `limit`.

    Guarantee: if every round passes this gate, no device's epsilon at the plan's delta exceeds `limit`.

    Raises:
        BudgetRefused: it would.
    """
    from aggregator.privacy import Budget, BudgetExceeded, check_budget

    try:
        check_budget(events, planned, Budget(limit, planned.privacy.delta))
    except BudgetExceeded as error:
        raise BudgetRefused(str(error)) from error
