"""Under which circumstances this device trains: what breaks the owner's limits. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from edge_client.configuration import ConditionLimits
from edge_client.events import Fault
from protocol.conditions import Conditions

UNMET = "conditions"
"""The code of a fault that these limits make."""
_DAY = 24 * 60


def unmet(limits: ConditionLimits, now: Conditions, minute: int, own_load: float = 0.0) -> Fault | None:
    """Finds the first limit that the present circumstances break.

    Args:
        limits: the owner's.
        now: the circumstances.
        minute: of the local day, from 0.
        own_load: what this client itself adds to the load per core right now.

    Returns:
        A transient fault, whose detail is for the aggregator; None when the device may train.
    """
    for reason in _broken(limits, now, minute, own_load):
        return Fault(UNMET, reason if limits.tell else "its owner's conditions are not met", transient=True)
    return None


def _broken(limits: ConditionLimits, now: Conditions, minute: int, own_load: float) -> Iterator[str]:
    if now.power == "battery" and limits.power == "mains":
        yield "it runs on battery, and trains on mains only"
    if now.power == "battery" and now.battery is not None and now.battery < limits.minimum_battery:
        yield f"its battery holds {now.battery} %, it trains from {limits.minimum_battery} %"
    if limits.maximum_temperature is not None and (now.temperature or 0.0) > limits.maximum_temperature:
        yield f"its processor has {now.temperature:.0f} C, it trains up to {limits.maximum_temperature:g} C"
    if limits.maximum_load is not None and (now.load or 0.0) - own_load > limits.maximum_load:
        yield f"others load it with {now.load:.2f} a core, it trains up to {limits.maximum_load:g}"
    if now.free_memory is not None and now.free_memory < limits.minimum_free_memory:
        yield f"{now.free_memory} MiB are free, it trains from {limits.minimum_free_memory} MiB"
    if now.metered and not limits.metered:
        yield "its link costs by the byte"
    for hours in limits.quiet_hours:
        if _within(hours, minute):
            yield f"its owner keeps it quiet, {hours}"


def _within(hours: str, minute: int) -> bool:
    first, last = (int(time[:2]) * 60 + int(time[3:]) for time in hours.split("-"))
    return (minute - first) % _DAY < (last - first) % _DAY


def worth_telling(told: Conditions, now: Conditions, seconds: float) -> bool:
    """Whether the operator should hear of a change; what wavers costs no message.

    Args:
        told: what was said last.
        now: the circumstances.
        seconds: since then.
    """
    if seconds < 60:
        return False
    if (told.power, told.metered, told.examples) != (now.power, now.metered, now.examples):
        return True
    if seconds >= 900 and _idle_step(told) != _idle_step(now):
        return True
    steps = (("battery", 10), ("temperature", 10), ("load", 1), ("free_memory", 128))
    return seconds >= 900 and any(
        (getattr(told, name) is None) != (getattr(now, name) is None)
        or abs((getattr(now, name) or 0) - (getattr(told, name) or 0)) >= step
        for name, step in steps
    )


def _idle_step(conditions: Conditions) -> int:
    """Rises when the hours double: what only grows is soon told, and a return at once."""
    return -1 if conditions.idle_hours is None else int(conditions.idle_hours).bit_length()
