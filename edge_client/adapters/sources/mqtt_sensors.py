"""Sensors at the owner's MQTT broker that announce themselves to Home Assistant (see `home_assistant`).

They send when they like; what is recorded is their last known state at a fixed period.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from edge_client.adapters.local_broker import LocalBroker
from edge_client.adapters.sources.recorded import RecordedSettings, RecordedSource, Sample, SensorError
from edge_client.configuration import BrokerSettings
from edge_client.home_assistant import MAX_PAYLOAD_BYTES, Entity, InvalidDiscovery, entities

_LOG = logging.getLogger("covey.edge.data")


class MqttSettings(RecordedSettings, BrokerSettings):
    """The keys of a `[[data]]` table with the source `mqtt`.

    `channels`, `targets` and `label` are unique ids, or object ids, of entities.

    Attributes:
        discovery: the prefix of the announcements.
        stale_seconds: a state that was not repeated for so long is not known any more.
    """

    discovery: Annotated[str, Field(pattern=r"^[^#+\x00]{1,200}$")] = "homeassistant"
    stale_seconds: Annotated[float, Field(gt=0)] = 3_600.0


def open_mqtt(options: Mapping[str, Any], directory: Path) -> RecordedSource:
    """The plug-in `mqtt`."""
    settings = MqttSettings.of(dict(options), "data (mqtt)")
    return RecordedSource(settings, directory, MqttSampler(settings))


class MqttSampler:
    """Follows the announced entities that the settings name, and knows their last states."""

    def __init__(self, settings: MqttSettings, *, steady: Callable[[], float] = time.monotonic) -> None:
        """Prepares the connection.

        Raises:
            InvalidConfiguration: the password or the CA cannot be read.
        """
        self._settings, self._steady = settings, steady
        self._wanted = {*settings.columns, *([settings.label] if settings.label else [])}
        self._prefix = f"{settings.discovery}/"
        self._lock = threading.Lock()
        # Of an entity's names -> who it is, and the topic that announced it.
        self._entities: dict[str, tuple[str, Entity]] = {}
        self._reasons: dict[str, str] = {}
        self._states: dict[str, tuple[bytes, float]] = {}
        filters = [f"{settings.discovery}/{levels}/config" for levels in ("+/+", "+/+/+")]
        self._broker = LocalBroker(settings, filters, self.heard, self.lost)

    def start(self) -> None:
        """Connects."""
        self._broker.start()

    def stop(self) -> None:
        """Disconnects."""
        self._broker.stop()

    def units(self) -> Mapping[str, str]:
        """As the entities announce them."""
        with self._lock:
            found = {name: self._entities.get(name) for name in self._settings.columns}
            return {name: own[1].unit for name, own in found.items() if own and own[1].unit}

    def sample(self, steady: float) -> Sample:
        """The last known states."""
        with self._lock:
            missing = sorted(self._wanted - self._entities.keys())
            if missing and len(missing) == len(self._wanted):
                why = "; ".join(self._reasons.values()) or "nobody announces it"
                raise SensorError(f"{', '.join(missing)} at {self._settings.broker}: {why}"[:500])
            values = tuple(self._number(name, steady) for name in self._settings.columns)
            return Sample(values, self._label(steady))

    def heard(self, topic: str, payload: bytes) -> None:
        """Takes a message of the broker's."""
        if topic.startswith(self._prefix) and topic.endswith("/config"):
            self._announced(topic, payload)
        elif len(payload) <= MAX_PAYLOAD_BYTES:
            with self._lock:
                self._states[topic] = (payload, self._steady())

    def lost(self) -> None:
        """Forgets all states: nobody knows how they changed meanwhile."""
        with self._lock:
            self._states.clear()

    # --- entities ----------------------------------------------------------------------------------------

    def _announced(self, topic: str, payload: bytes) -> None:
        try:
            announced = entities(topic, payload)
        except InvalidDiscovery as error:
            # Most are of sensors that nobody here asks for.
            if any(name in topic for name in self._wanted):
                _LOG.warning("announcement-unusable topic=%s reason=%r", topic, str(error))
                with self._lock:
                    self._reasons[topic] = str(error)
            announced = ()
        with self._lock:
            self._entities = {name: own for name, own in self._entities.items() if own[0] != topic}
            for entity in announced:
                for name in entity.names & self._wanted:
                    self._entities[name] = (topic, entity)
                    self._reasons.pop(topic, None)
            topics = {
                each
                for _, entity in self._entities.values()
                for each in (entity.state, *(part.topic for part in entity.availability))
            }
            self._states = {each: state for each, state in self._states.items() if each in topics}
        for each in sorted(topics):
            self._broker.subscribe(each)

    def _payload(self, name: str, steady: float) -> tuple[Entity, bytes] | None:
        """An entity and the message with its present state, if that is known."""
        own = self._entities.get(name)
        if own is None:
            return None
        entity = own[1]
        state = self._states.get(entity.state)
        if state is None or steady - state[1] > min(entity.expires, self._settings.stale_seconds):
            return None
        for part in entity.availability:
            said = self._states.get(part.topic)
            if said is not None and part.place.text(said[0]) == part.unavailable:
                return None
        return entity, state[0]

    def _number(self, name: str, steady: float) -> float:
        known = self._payload(name, steady)
        return math.nan if known is None else known[0].number(known[1])

    def _label(self, steady: float) -> str | None:
        if self._settings.label is None:
            return None
        known = self._payload(self._settings.label, steady)
        text = None if known is None else known[0].place.text(known[1])
        return None if text in (None, "", "unknown", "unavailable", "None") else text
