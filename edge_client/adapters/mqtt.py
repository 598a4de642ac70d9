"""The connection to the broker: bytes in, bytes out, and when it is there.

One thread connects, and turns paho's loop itself: whatever ends a connection, paho's own errors included,
the next attempt follows, and there is no other thread to wait for. Callbacks hand over to a bounded queue and
return. Nothing is queued while the broker is away: the core repeats what matters, from what is on disk. Each
connection has a fresh paho client and a fresh session id, so that the late will of an old connection is told
from the present one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_client.adapters.tls import TlsFiles
from protocol import topics
from protocol.broker_address import BrokerAddress
from protocol.codec import MAX_FRAME_BYTES, encode
from protocol.conditions import Conditions
from protocol.messages import DeviceStatus, VersionFailure

MqttVersion = Literal["auto", "5", "3.1.1"]

KEEPALIVE_SECONDS = 30
SESSION_EXPIRY_SECONDS = 7 * 86_400
RECEIVE_MAXIMUM = 32
MAX_QUEUED_OUT = 256
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 60.0
# amqtt says nothing at all to an MQTT 5 client; a broker across a slow link needs a moment.
HANDSHAKE_SECONDS = {MQTTProtocolVersion.MQTTv5: 3.0, MQTTProtocolVersion.MQTTv311: 10.0}
LOOP_SECONDS = 1.0
PARTING_SECONDS = 2.0
NO_RIGHTS = (
    "the broker gives this device no rights: it was enrolled a moment ago, or is not of the fleet any more; "
    "the fleet's operator sees which by `covey device show`"
)
UNKNOWN: Final = Conditions()
NONE: Final[Mapping[str, VersionFailure]] = MappingProxyType({})
# A device goes to its broker directly, whatever PySocks and the environment say.
vars(paho)["socks"] = None
# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
_OUT_OF_TIME = (9, 10)
_RANDOM = secrets.SystemRandom()
_LOG = logging.getLogger("covey.edge.mqtt")


@dataclass(frozen=True)
class Inbound:
    """A message as it came; `acknowledge` once it is handled."""

    topic: str
    frame: bytes
    acknowledge: Callable[[], None] = field(repr=False)


@dataclass(frozen=True)
class LinkUp:
    """The broker accepted this device, and the subscriptions are asked for."""

    session: bytes
    version: str


@dataclass(frozen=True)
class LinkDown:
    """The connection is gone."""

    reason: str


LinkEvent = Inbound | LinkUp | LinkDown


class Sink(Protocol):
    """Takes what the link hears; called on the link's threads, it must return at once."""

    def __call__(self, event: LinkEvent) -> bool:
        """Returns False when there is no room; the broker delivers the message again later."""
        ...


@dataclass(frozen=True)
class LinkSettings:
    """How to reach the broker.

    Attributes:
        version: MQTT 5 where the broker speaks it, else 3.1.1; or one of them only.
    """

    device_id: str
    address: BrokerAddress
    tls: TlsFiles | None = None
    version: MqttVersion = "auto"
    first_delay: float = FIRST_DELAY_SECONDS
    max_delay: float = MAX_DELAY_SECONDS


@dataclass
class _Connection:
    """One attempt to be connected."""

    client: paho.Client
    session: bytes
    gone: threading.Event = field(default_factory=threading.Event)
    answered: bool = False
    up: bool = False
    useless: bool = False
    """It came up, but the broker lets it do nothing, or sends more than it takes."""
    reached: bool = False
    reason: str = "the broker did not answer"

    def end(self) -> None:
        """Has the connecting thread leave it, at once; from any thread."""
        self.gone.set()
        self.client.disconnect()  # wakes the loop, too


class MqttLink:
    """Keeps one device connected. `start` and `stop` once; `send` from any thread."""

    def __init__(self, settings: LinkSettings, sink: Sink) -> None:
        """Prepares the link.

        Raises:
            InvalidAddress: the TLS files cannot be used.
        """
        self._settings = settings
        self._sink = sink
        self._tls = settings.tls.context() if settings.address.tls and settings.tls else None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="covey-mqtt", daemon=True)
        self._current: _Connection | None = None

    def start(self) -> None:
        """Begins to connect, and to reconnect for ever."""
        self._thread.start()

    def stop(self, status: DeviceStatus | None = None, *, seconds: float = 2.0) -> None:
        """Says goodbye with an offline status, if the broker is there, and disconnects.

        Args:
            status: what to leave behind; its session is set to the connection's.
            seconds: how long the broker may take to acknowledge it.
        """
        self._stopping.set()
        connection = self._current
        if connection is not None and connection.up:
            offline = (
                status or DeviceStatus(session=connection.session, online=False, models={})
            ).model_copy(update={"session": connection.session, "online": False})
            topic = topics.up(self._settings.device_id, "status")
            info = connection.client.publish(topic, encode(offline), qos=1, retain=True)
            try:
                info.wait_for_publish(seconds)
            except (RuntimeError, ValueError):
                _LOG.debug("the offline status was not acknowledged")
        if connection is not None:
            connection.end()
        if self._thread.is_alive():
            self._thread.join(timeout=seconds + 5)

    def use(self, tls: TlsFiles) -> None:
        """Connects anew, with another certificate.

        Raises:
            InvalidAddress: the files cannot be used; nothing changed.
        """
        if self._settings.address.tls:
            self._tls = tls.context()
        connection = self._current
        if connection is not None:
            connection.reason = "this device has a new certificate"
            connection.end()

    def send(self, channel: topics.UpChannel, frame: bytes, *, retain: bool = False) -> bool:
        """Publishes at QoS 1; returns False when the broker is away or its queue is full."""
        connection = self._current
        if connection is None or not connection.up:
            return False
        topic = topics.up(self._settings.device_id, channel)
        return connection.client.publish(topic, frame, qos=1, retain=retain).rc == paho.MQTT_ERR_SUCCESS

    # --- the connecting thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._keep_connected()
            except Exception:
                # Out of memory, or a defect: without this thread the device would be deaf for good.
                _LOG.exception("link-failed")
                self._stopping.wait(self._settings.max_delay)

    def _keep_connected(self) -> None:
        failures = 0
        versions = itertools.cycle(_versions(self._settings.version))
        version = next(versions)
        while not self._stopping.is_set():
            connection = self._open(version)
            self._current = connection
            if self._live(connection, version):
                failures = 0
            else:
                failures += 1
                if connection.reached and not connection.useless:
                    # Somebody is there who does not answer, or refuses: it may be the version.
                    version = next(versions)
            self._current = None
            if self._stopping.is_set():
                break
            delay = backoff(failures, self._settings.first_delay, self._settings.max_delay)
            _LOG.info("disconnected reason=%r retry_s=%.1f", connection.reason, delay)
            self._stopping.wait(delay)

    def _live(self, connection: _Connection, version: MQTTProtocolVersion) -> bool:
        """Connects and stays until the connection is gone; returns whether it ever was of use."""
        client, address = connection.client, self._settings.address
        try:
            if version == MQTTProtocolVersion.MQTTv5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
                properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS
                properties.ReceiveMaximum = RECEIVE_MAXIMUM
                properties.MaximumPacketSize = MAX_FRAME_BYTES + 1024
                client.connect(
                    address.host, address.port, KEEPALIVE_SECONDS, clean_start=False, properties=properties
                )
            else:
                client.connect(address.host, address.port, KEEPALIVE_SECONDS)
        except (OSError, ValueError) as error:
            connection.reason = f"cannot connect to {address}: {error}"
            if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _OUT_OF_TIME:
                # A Pi without a clock chip starts in the past; the network time comes after a while.
                now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
                connection.reason += f"; waiting for the right time, this device's clock says {now}"
            return False
        connection.reached = True
        try:
            self._turn(connection, time.monotonic() + HANDSHAKE_SECONDS[version])
        except OSError as error:
            # No descriptor, or the like: the broker hears nothing of it, so the version is not to blame.
            connection.reached = connection.answered
            connection.reason = f"connected to {address}, but this machine is short of something: {error}"
        except Exception as error:
            # What no broker should send, and paho does not expect.
            _LOG.exception("connection-broken")
            connection.reason = f"the broker sent what is not MQTT: {type(error).__name__}"
        finally:
            _part(client)
        if connection.up:
            connection.up = False
            self._sink(LinkDown(connection.reason))
            return not connection.useless
        return False

    def _turn(self, connection: _Connection, answer_until: float) -> None:
        """Reads and writes until the connection is gone, or nobody answered in time."""
        while not connection.gone.is_set() and (connection.answered or time.monotonic() < answer_until):
            if connection.client.loop(LOOP_SECONDS) != paho.MQTT_ERR_SUCCESS:
                return

    def _open(self, version: MQTTProtocolVersion) -> _Connection:
        settings = self._settings
        five = version == MQTTProtocolVersion.MQTTv5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.device_id,
            clean_session=None if five else False,
            protocol=version,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_queued_messages_set(MAX_QUEUED_OUT)
        client.connect_timeout = 10.0
        # With it, `publish` leaves writing to the loop's thread, whoever calls it.
        client.on_socket_register_write = lambda *_: None
        if self._tls is not None:
            client.tls_set_context(self._tls)
        connection = _Connection(client, secrets.token_bytes(32))
        will = encode(DeviceStatus(session=connection.session, online=False, models={}))
        client.will_set(topics.up(settings.device_id, "status"), will, qos=1, retain=True)

        def on_connect(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            if reason.is_failure:
                connection.reason = f"the broker refused: {reason}"
                connection.gone.set()
            else:
                # The fleet's versions first: this device's own assignment may refer to them.
                client.subscribe([(topics.MODELS, 1), (topics.downlinks(settings.device_id), 1)])
                connection.up = True
                self._sink(LinkUp(connection.session, "5" if five else "3.1.1"))
            connection.answered = True

        def on_subscribe(_: Any, __: Any, ___: int, reasons: Any, ____: Any) -> None:
            # A broker that does not know a device lets it connect, and then neither speak nor listen.
            if any(reason.is_failure for reason in reasons):
                connection.reason, connection.useless = NO_RIGHTS, True
                connection.gone.set()

        def on_disconnect(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            if connection.up and not connection.useless:
                connection.reason = f"the connection ended: {reason}"
            connection.gone.set()

        def on_message(_: Any, __: Any, message: paho.MQTTMessage) -> None:
            mid, qos = message.mid, message.qos

            def acknowledge() -> None:
                # An identifier means nothing on another connection; what was not acknowledged comes again.
                if connection.up and not connection.gone.is_set():
                    client.ack(mid, qos)

            if not self._sink(Inbound(message.topic, bytes(message.payload), acknowledge)):
                # Until it is acknowledged it takes a place in the broker's window, and it comes again only on
                # another connection.
                connection.reason = "more came than this device takes in at a time"
                connection.useless = True
                connection.gone.set()

        client.on_connect = on_connect
        client.on_subscribe = on_subscribe
        client.on_disconnect = on_disconnect
        client.on_message = on_message
        return connection


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


def backoff(failures: int, first: float, longest: float) -> float:
    """Seconds until the next attempt: doubling, and anywhere in the upper half of that.

    A fleet that lost its broker at one moment must not come back in one.
    """
    ceiling = min(longest, first * 2.0 ** min(failures, 16))
    return _RANDOM.uniform(ceiling / 2, ceiling)


def _versions(choice: MqttVersion) -> tuple[MQTTProtocolVersion, ...]:
    five, three = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
    return {"auto": (five, three), "5": (five,), "3.1.1": (three,)}[choice]


def birth(
    session: bytes,
    models: Mapping[str, int],
    client_version: str,
    runtime: str,
    *,
    target: str = "",
    failures: Mapping[str, VersionFailure] = NONE,
    conditions: Conditions = UNKNOWN,
) -> bytes:
    """The frame that says that this device is there, what it serves, what failed on it, and how it is."""
    return encode(
        DeviceStatus(
            session=session,
            online=True,
            client_version=client_version,
            runtime=runtime,
            target=target,
            models=dict(models),
            failures=dict(failures),
            conditions=conditions,
        )
    )
