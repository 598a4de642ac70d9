"""Home Assistant's MQTT discovery: which entity is where, and what a message of its says. Pure.

Devices announce themselves on `<prefix>/<component>/[<node>/]<object>/config`, or with all components on
`<prefix>/device/[<node>/]<object>/config`, in JSON with long or abbreviated keys (home-assistant.io,
"MQTT Discovery"). Of its templates, those that only name a value are understood.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

MAX_PAYLOAD_BYTES = 65_536
MAX_TOPIC = 1_024
MAX_COMPONENTS = 256

_LONG: Final = MappingProxyType(
    {
        "avty": "availability",
        "avty_mode": "availability_mode",
        "avty_t": "availability_topic",
        "avty_tpl": "availability_template",
        "cmps": "components",
        "exp_aft": "expire_after",
        "p": "platform",
        "pl_avail": "payload_available",
        "pl_not_avail": "payload_not_available",
        "pl_off": "payload_off",
        "pl_on": "payload_on",
        "stat_t": "state_topic",
        "t": "topic",
        "uniq_id": "unique_id",
        "unit_of_meas": "unit_of_measurement",
        "val_tpl": "value_template",
    }
)
# Rounding and conversions to numbers are for display: what is recorded is the value itself.
_TEMPLATE = re.compile(
    r"\{\{-?\s*(?P<root>value_json|value)(?P<path>(?:\.\w+|\[\s*(?:'[^'\]]*'|\"[^\"\]]*\"|\d+)\s*\])*)\s*"
    r"(?:\|\s*(?:float|int|round)\s*(?:\([^()]*\))?\s*)*-?\}\}"
)
_STEP = re.compile(r"\.(\w+)|\[\s*(?:'([^']*)'|\"([^\"]*)\"|(\d+))\s*\]")


class InvalidDiscovery(ValueError):
    """An announcement that cannot be used; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where in a message a value is.

    Attributes:
        steps: keys and indices into the JSON of the message; None for the message as it is.
    """

    steps: tuple[str | int, ...] | None = None

    @classmethod
    def of(cls, template: str | None) -> Place:
        """What a template names; none is the whole message.

        Raises:
            InvalidDiscovery: it computes something.
        """
        if template is None or not template.strip():
            return cls()
        match = _TEMPLATE.fullmatch(template.strip())
        if match is None or (match["root"] == "value" and match["path"]):
            raise InvalidDiscovery(f"its value_template {template[:200]!r} does more than to name a value")
        if match["root"] == "value":
            return cls()
        steps: list[str | int] = []
        for word, single, double, index in _STEP.findall(match["path"]):
            steps.append(int(index) if index else word or single or double)
        return cls(tuple(steps))

    def text(self, payload: bytes) -> str | None:
        """The value in a message as text; None when there is none."""
        try:
            if self.steps is None:
                return payload.decode().strip()
            found: Any = json.loads(payload)
            for step in self.steps:
                found = found[step]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if isinstance(found, bool):
            return "true" if found else "false"
        return str(found) if isinstance(found, str | int | float) else None


@dataclass(frozen=True)
class Availability:
    """A topic that says whether an entity's state can be believed."""

    topic: str
    place: Place
    unavailable: str


@dataclass(frozen=True)
class Entity:
    """One announced sensor.

    Attributes:
        names: its unique id, and the object id of its topic.
        state: the topic of its state.
        place: where in a message of that topic the state is.
        unit: of measurement.
        expires: seconds for which a state holds; infinite when nothing is said.
        on_off: what stands for 1 and for 0, where it is no number.
    """

    names: frozenset[str]
    state: str
    place: Place
    unit: str | None
    expires: float
    on_off: tuple[str, str]
    availability: tuple[Availability, ...]

    def number(self, payload: bytes) -> float:
        """The state in a message as a number; NaN when it is unknown or none."""
        text = self.place.text(payload)
        if text is None:
            return math.nan
        if text in self.on_off:
            return 1.0 if text == self.on_off[0] else 0.0
        try:
            number = float(text)
        except ValueError:
            return math.nan
        return number if math.isfinite(number) else math.nan


def entities(topic: str, payload: bytes) -> tuple[Entity, ...]:
    """What an announcement announces; nothing, when it takes an earlier one back.

    Raises:
        InvalidDiscovery: it cannot be used.
    """
    if not payload:
        return ()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidDiscovery(f"an announcement of {len(payload)} bytes")
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        raise InvalidDiscovery("it is no JSON") from None
    if not isinstance(content, dict):
        raise InvalidDiscovery("it is no JSON object")
    whole = _spelt_out(content)
    components = whole.pop("components", None)
    last = topic.split("/")[-2] if "/" in topic else topic
    if components is None:
        return (_entity(whole, last),)
    if not isinstance(components, dict) or len(components) > MAX_COMPONENTS:
        raise InvalidDiscovery("its components are none, or too many")
    found = []
    for key, own in components.items():
        # One that is removed has only its platform left.
        if isinstance(own, dict) and len(own) > 1:
            spelt = _spelt_out(own)
            if "state_topic" in spelt or "state_topic" in whole:
                found.append(_entity({**whole, **spelt}, str(key)))
    return tuple(found)


def _entity(keys: Mapping[str, Any], name: str) -> Entity:
    unique = keys.get("unique_id")
    unit = keys.get("unit_of_measurement")
    expires = keys.get("expire_after")
    return Entity(
        names=frozenset({name, *([unique] if isinstance(unique, str) else [])}),
        state=_topic(keys, "state_topic"),
        place=Place.of(_text(keys, "value_template")),
        unit=unit if isinstance(unit, str) else None,
        expires=float(expires) if isinstance(expires, int | float) and expires > 0 else math.inf,
        on_off=(_text(keys, "payload_on") or "ON", _text(keys, "payload_off") or "OFF"),
        availability=tuple(_availability(keys)),
    )


def _availability(keys: Mapping[str, Any]) -> list[Availability]:
    given = keys.get("availability")
    if isinstance(given, dict):
        given = [given]
    if isinstance(given, list):
        several = [_spelt_out(each) for each in given[:16] if isinstance(each, dict)]
    elif "availability_topic" in keys:
        several = [
            {
                "topic": keys["availability_topic"],
                "value_template": keys.get("availability_template"),
                "payload_not_available": keys.get("payload_not_available"),
            }
        ]
    else:
        return []
    base = keys.get("~")
    return [
        Availability(
            _topic({**each, "~": base}, "topic"),
            Place.of(_text(each, "value_template")),
            _text(each, "payload_not_available") or "offline",
        )
        for each in several
    ]


def _spelt_out(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {_LONG.get(key, key): value for key, value in keys.items()}


def _text(keys: Mapping[str, Any], name: str) -> str | None:
    value = keys.get(name)
    return value if isinstance(value, str) else None


def _topic(keys: Mapping[str, Any], name: str) -> str:
    """A topic, with the base that `~` at its start or end stands for."""
    value, base = _text(keys, name), _text(keys, "~")
    if value is not None and base is not None:
        if value.startswith("~"):
            value = base + value[1:]
        elif value.endswith("~"):
            value = value[:-1] + base
    if not value or len(value) > MAX_TOPIC or any(sign in value for sign in "#+\0"):
        raise InvalidDiscovery(f"it has no usable {name}")
    return value
