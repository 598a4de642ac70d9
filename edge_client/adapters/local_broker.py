"""A connection to the owner's own MQTT broker, such as Home Assistant's: never the fleet's."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_client.configuration import BrokerSettings, InvalidConfiguration

KEEPALIVE_SECONDS = 60
RECONNECT_SECONDS = (1, 60)
MAX_QUEUED_OUT = 64
_LOG = logging.getLogger("covey.edge.local")


class LocalBroker:
    """Keeps subscriptions at the owner's broker for as long as it is used; it reconnects by itself."""

    def __init__(
        self,
        settings: BrokerSettings,
        subscriptions: Sequence[str],
        on_message: Callable[[str, bytes], None],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares a connection.

        Args:
            settings: how to reach the broker.
            subscriptions: filters, asked for at each connection.
            on_message: takes topic and payload, on the connection's thread.
            on_lost: told when the connection is gone, on the same thread.

        Raises:
            InvalidConfiguration: the password or the CA cannot be read.
        """
        self._address, self._filters = settings.address(), list(subscriptions)
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv311
        )
        client.max_queued_messages_set(MAX_QUEUED_OUT)
        client.reconnect_delay_set(*RECONNECT_SECONDS)
        if settings.username is not None:
            client.username_pw_set(settings.username, _password(settings.password_file))
        if self._address.tls:
            try:
                client.tls_set_context(ssl.create_default_context(cafile=settings.ca))
            except (OSError, ssl.SSLError) as error:
                raise InvalidConfiguration(f"ca: {settings.ca} cannot be used: {error}") from error

        def connected(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            if reason.is_failure:
                _LOG.warning("local-broker-refused broker=%s reason=%r", self._address, str(reason))
                return
            client.subscribe([(each, 1) for each in self._filters])

        def message(_: Any, __: Any, heard: paho.MQTTMessage) -> None:
            try:
                on_message(heard.topic, bytes(heard.payload))
            except Exception:
                # One message that nobody thought of must not end the thread that hears all others.
                # Without its topic, which may be what it fails on.
                _LOG.exception("local-message-rejected")

        client.on_connect, client.on_message = connected, message
        client.on_disconnect = lambda *_: on_lost()

    def start(self) -> None:
        """Connects, now or when the broker is there."""
        self._client.connect_async(self._address.host, self._address.port, KEEPALIVE_SECONDS)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnects."""
        self._client.disconnect()
        self._client.loop_stop()

    def subscribe(self, topic: str) -> None:
        """Adds a subscription, now and for every later connection."""
        if topic not in self._filters:
            self._filters.append(topic)
            self._client.subscribe(topic, 1)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publishes at QoS 1; nothing is kept for a broker that is away for long."""
        self._client.publish(topic, payload, qos=1)


def _password(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise InvalidConfiguration(f"password_file: {path} cannot be read: {error!r}") from error
