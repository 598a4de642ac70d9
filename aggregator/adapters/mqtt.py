"""The connection to the broker: paho on a thread of its own, bridged to the one main loop.

That thread connects and turns paho's loop itself: whatever ends a connection, paho's own errors included, the
next attempt follows. Callbacks hand over to a bounded queue. A delivery is acknowledged only when the main
loop says so; with MQTT 5 the broker keeps at most `RECEIVE_MAXIMUM` of them under way, so the queue never
fills up there. Every connection has a paho client of its own: what an old one still wanted to send is sent
again by the core.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from aggregator.adapters.tls import TlsFiles
from aggregator.transport import Connected, Delivery, Disconnected, Inbound
from protocol import topics
from protocol.broker_address import BrokerAddress
from protocol.codec import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 30
SESSION_EXPIRY_SECONDS = 7 * 86_400
RECEIVE_MAXIMUM = 512
QUEUE_LIMIT = 2048
HANDOVER_SECONDS = 5.0
INFLIGHT = 128
BUSY_BYTES = 16 * 2**20
FULL_BYTES = 64 * 2**20
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 30.0
# amqtt says nothing at all to an MQTT 5 client; a broker across a slow link needs a moment.
HANDSHAKE_SECONDS = {5: 3.0, 4: 10.0}
LOOP_SECONDS = 1.0
PARTING_SECONDS = 2.0
_RANDOM = secrets.SystemRandom()


@dataclass
class _Connection:
    """One attempt to be connected."""

    client: paho.Client
    gone: threading.Event = field(default_factory=threading.Event)
    answered: bool = False
    up: bool = False
    reason: str = "the broker did not answer"


@dataclass(frozen=True)
class _Token:
    """What it takes to acknowledge a delivery: its identifier means nothing on another connection."""

    connection: _Connection
    mid: int
    qos: int


class _Outgoing:
    """How many bytes wait to be acknowledged by the broker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
        self._early: set[int] = set()
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def add(self, mid: int, size: int) -> None:
        with self._lock:
            if mid in self._early:  # acknowledged before publish() returned
                self._early.discard(mid)
                return
            self._sizes[mid] = size
            self._total += size

    def done(self, mid: int) -> None:
        with self._lock:
            size = self._sizes.pop(mid, None)
            if size is None:
                self._early.add(mid)
            else:
                self._total -= size


class MqttTransport:
    """A transport over MQTT 5, or 3.1.1 where the broker speaks nothing newer.

    Example:
        transport = MqttTransport(BrokerAddress.parse("mqtt://localhost:1883"), "covey-aggregator")
        transport.start()
        try:
            Service(..., transport, ...).run(stop)
        finally:
            transport.stop()
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        tls: TlsFiles | None = None,
        *,
        more: Sequence[str] = (),
    ) -> None:
        """Prepares the transport; `start` connects.

        Args:
            client_id: fixed, so that the broker keeps the session over restarts.
            more: what it subscribes to besides the uplinks of all devices.

        Raises:
            InvalidAddress: the TLS files cannot be used.
        """
        self._address = address
        self._client_id = client_id
        self._subscriptions = [(topic, 1) for topic in (topics.UPLINKS, *more)]
        self._tls = (tls or TlsFiles()).context() if address.tls else None
        self._inbound: queue.Queue[tuple[Inbound, _Connection]] = queue.Queue(QUEUE_LIMIT)
        self._outgoing = _Outgoing()
        self._stopping = threading.Event()
        self._current: _Connection | None = None
        self._thread = threading.Thread(target=self._run, name="covey-mqtt", daemon=True)

    # --- for the main loop

    def start(self) -> None:
        """Begins to connect, and to reconnect for ever."""
        self._thread.start()

    def stop(self) -> None:
        """Disconnects; what was not acknowledged comes again next time."""
        self._stopping.set()
        self.reset()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def receive(self, limit: int, timeout: float) -> list[Inbound]:
        """Waits for something to come; see `Transport`."""
        batch: list[Inbound] = []
        try:
            item, connection = self._inbound.get(timeout=timeout)
            while True:
                # A delivery of an earlier connection cannot be acknowledged, and comes again on this one.
                if not isinstance(item, Delivery) or connection is self._current:
                    batch.append(item)
                if len(batch) >= limit:
                    break
                item, connection = self._inbound.get_nowait()
        except queue.Empty:
            pass
        return batch

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledges to the broker, if the connection is still the one that it came on."""
        token = delivery.token
        if isinstance(token, _Token) and token.connection is self._current and token.connection.up:
            token.connection.client.ack(token.mid, token.qos)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Publishes at QoS 1; returns False when the broker is away or too much is waiting."""
        connection = self._current
        if connection is None or not connection.up or self._outgoing.total > FULL_BYTES:
            return False
        info = connection.client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            return False
        self._outgoing.add(info.mid, len(payload))
        return True

    def busy(self) -> bool:
        """Whether so much waits that bulk data should be asked for again later."""
        return self._outgoing.total > BUSY_BYTES

    def reset(self) -> None:
        """Drops the present connection; the connecting thread makes a new one."""
        connection = self._current
        if connection is not None:
            connection.gone.set()
            connection.client.disconnect()  # wakes the loop, too

    # --- the connecting thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._keep_connected()
            except Exception:
                # Out of memory, or a defect: without this thread the service would be deaf for good.
                logger.exception("the connection to %s failed", self._address)
                self._stopping.wait(LONGEST_DELAY_SECONDS)

    def _keep_connected(self) -> None:
        failures, version = 0, 5
        while not self._stopping.is_set():
            connection = self._open(version)
            self._outgoing = _Outgoing()
            self._current = connection
            was_up = self._live(connection, version)
            self._current = None
            if was_up:
                failures = 0
                self._hand_over(Disconnected(), connection)
            else:
                failures += 1
                # Silence or a closed door may mean "I do not speak this version".
                version = 4 if version == 5 else 5
            if not self._stopping.is_set():
                delay = backoff(failures)
                logger.info(
                    "not connected to %s (%s), again in %.1f s", self._address, connection.reason, delay
                )
                self._stopping.wait(delay)

    def _live(self, connection: _Connection, version: int) -> bool:
        """Connects and stays until the connection is gone; returns whether it ever was up."""
        client = connection.client
        try:
            if version == 5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS
                properties.ReceiveMaximum = RECEIVE_MAXIMUM
                properties.MaximumPacketSize = MAX_FRAME_BYTES + 1024
                client.connect(
                    self._address.host,
                    self._address.port,
                    KEEPALIVE_SECONDS,
                    clean_start=False,
                    properties=properties,
                )
            else:
                client.connect(self._address.host, self._address.port, KEEPALIVE_SECONDS)
        except (OSError, ValueError) as error:
            connection.reason = str(error)
            return False
        try:
            self._turn(connection, time.monotonic() + HANDSHAKE_SECONDS[version])
        except Exception as error:
            # What no broker should send, and paho does not expect; or no descriptor is left.
            logger.exception("the connection to %s broke", self._address)
            connection.reason = f"the connection broke: {type(error).__name__}: {error}"
        finally:
            _part(client)
        was_up, connection.up = connection.up, False
        return was_up

    def _turn(self, connection: _Connection, answer_until: float) -> None:
        """Reads and writes until the connection is gone, or nobody answered in time."""
        while not connection.gone.is_set() and (connection.answered or time.monotonic() < answer_until):
            if connection.client.loop(LOOP_SECONDS) != paho.MQTT_ERR_SUCCESS:
                return

    def _open(self, version: int) -> _Connection:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if version == 5 else False,
            protocol=MQTTProtocolVersion(version),
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages_set(INFLIGHT)
        client.max_queued_messages_set(0)  # bounded by bytes, in publish()
        client.connect_timeout = 10.0
        # With it, `publish` leaves writing to the loop's thread, whoever calls it.
        client.on_socket_register_write = lambda *_: None
        if self._tls is not None:
            client.tls_set_context(self._tls)
        connection = _Connection(client)

        def on_connect(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            if reason.is_failure:
                connection.reason = f"the broker refused: {reason}"
                connection.gone.set()
            else:
                client.subscribe(self._subscriptions)
                connection.up = True
                # Before any delivery of this connection: they all come from this thread.
                self._hand_over(Connected(), connection)
            connection.answered = True

        def on_disconnect(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            connection.reason = f"the connection ended: {reason}"
            connection.gone.set()

        def on_publish(_: Any, __: Any, mid: int, ___: Any, ____: Any) -> None:
            self._outgoing.done(mid)

        def on_message(_: Any, __: Any, message: paho.MQTTMessage) -> None:
            token = _Token(connection, message.mid, message.qos)
            if len(message.payload) > MAX_FRAME_BYTES:
                logger.warning("dropped %d bytes on %s", len(message.payload), message.topic)
                client.ack(message.mid, message.qos)
                return
            self._hand_over(
                Delivery(message.topic, bytes(message.payload), token, time.monotonic()), connection
            )

        client.on_connect = on_connect
        client.on_disconnect = on_disconnect
        client.on_publish = on_publish
        client.on_message = on_message
        return connection

    def _hand_over(self, item: Inbound, connection: _Connection) -> None:
        deadline = time.monotonic() + HANDOVER_SECONDS
        while not connection.gone.is_set() or not isinstance(item, Delivery):
            try:
                self._inbound.put((item, connection), timeout=0.2)
                return
            except queue.Full:
                # The main loop is stuck: a delivery that is not taken comes again on the next connection.
                if isinstance(item, Delivery) and time.monotonic() > deadline:
                    connection.gone.set()
                if self._stopping.is_set():
                    return


def _part(client: paho.Client) -> None:
    """Disconnects, and closes what is open; a broker that does not listen any more is not waited for."""
    until = time.monotonic() + PARTING_SECONDS
    with contextlib.suppress(Exception):  # of a paho that is broken already
        client.disconnect()
        while client.socket() is not None and time.monotonic() < until:
            client.loop(0.1)
    sock = client.socket()
    if sock is not None:
        sock.close()


def backoff(failures: int) -> float:
    """Seconds until the next attempt: doubling, and anywhere in the upper half of that."""
    ceiling = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(failures, 16))
    return _RANDOM.uniform(ceiling / 2, ceiling)
