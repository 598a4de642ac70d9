"""The device's connection on real brokers: birth, will, reconnect, acknowledgement, refused addresses."""

from __future__ import annotations

import datetime as dt
import errno
import getpass
import ipaddress
import queue
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.broker import BrokerProcess, find_mosquitto, free_port
from edge_client.adapters.credentials import tls_files
from edge_client.adapters.mqtt import (
    RECEIVE_MAXIMUM,
    Inbound,
    LinkDown,
    LinkEvent,
    LinkSettings,
    LinkUp,
    MqttLink,
    MqttVersion,
    backoff,
    birth,
)
from edge_client.adapters.tls import TlsFiles
from edge_client.policy import DevicePolicy
from models import zoo
from models.weights import encode_weights
from protocol.broker_address import BrokerAddress, InvalidAddress
from protocol.codec import encode
from protocol.messages import Refusal, RoundEnd
from tests.edge_broker import Device, Fleet, Hub, command, running, wait_for
from tests.integration.test_edge_rounds import Round

ROUND = "a" * 32


class Listener:
    """A link, and what it heard."""

    def __init__(
        self, broker: BrokerProcess, device_id: str = "barn-1", version: MqttVersion = "auto"
    ) -> None:
        self.events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.full = False
        settings = LinkSettings(
            device_id, BrokerAddress.parse(broker.url), version=version, first_delay=0.1, max_delay=0.5
        )
        self.link = MqttLink(settings, self._take)
        self.link.start()

    def _take(self, event: LinkEvent) -> bool:
        if self.full and isinstance(event, Inbound):
            return False
        self.events.put(event)
        return True

    def next(self, kind: type[LinkEvent], seconds: float = 120.0) -> LinkEvent:
        deadline = time.monotonic() + seconds
        while True:
            event = self.events.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(event, kind):
                return event

    def up(self) -> LinkUp:
        event = self.next(LinkUp)
        assert isinstance(event, LinkUp)
        return event

    def subscribed(self, hub: Hub) -> None:
        """Until the broker has its subscription: that comes before the birth, which somebody else hears."""
        up = self.up()
        assert self.link.send("status", birth(up.session, {}, "0", ""), retain=True)
        wait_for(lambda: hub.online("barn-1"))

    def inbound(self) -> Inbound:
        event = self.next(Inbound)
        assert isinstance(event, Inbound)
        return event


def end(number: int) -> RoundEnd:
    return RoundEnd(round_id=f"{number:032x}", completed=True)


def test_birth_messages_and_goodbye(broker: BrokerProcess) -> None:
    with Hub(broker) as hub:
        listener = Listener(broker)
        up = listener.up()
        assert up.version == ("5" if broker.kind == "mosquitto" else "3.1.1")
        assert listener.link.send("status", birth(up.session, {"watch": 3}, "0.1", "none"), retain=True)
        wait_for(lambda: hub.serving("barn-1") == {"watch": 3})
        hub.send("barn-1", end(1))
        inbound = listener.inbound()
        assert inbound.topic == "covey/v1/dev/barn-1/down/msg" and inbound.frame == encode(end(1))
        inbound.acknowledge()
        hub.send("barn-2", end(2))
        listener.link.stop()
        wait_for(lambda: not hub.online("barn-1"))
        last = hub.last_status("barn-1")
        assert last is not None and last.session == up.session and not last.online
        assert not listener.link.send("msg", b"")
        assert all(not isinstance(event, Inbound) for event in drain(listener))


def drain(listener: Listener) -> list[LinkEvent]:
    events = []
    while not listener.events.empty():
        events.append(listener.events.get())
    return events


def test_a_killed_broker_is_reconnected_with_a_new_session(broker: BrokerProcess) -> None:
    listener = Listener(broker)
    try:
        first = listener.up()
        broker.kill()
        listener.next(LinkDown)
        assert not listener.link.send("msg", b"x")
        broker.restart()
        second = listener.up()
        assert second.session != first.session
        with Hub(broker) as hub:
            frame = birth(second.session, {}, "0", "")
            wait_for(lambda: listener.link.send("status", frame, retain=True))
            wait_for(lambda: hub.online("barn-1"))
            hub.send("barn-1", end(1))
            listener.inbound().acknowledge()
    finally:
        listener.link.stop()


def test_what_was_not_acknowledged_comes_again(mosquitto: BrokerProcess) -> None:
    listener = Listener(mosquitto)
    with Hub(mosquitto) as hub:
        listener.subscribed(hub)
        for number in range(3):
            hub.send("barn-1", end(number))
        listener.inbound().acknowledge()
        stale = listener.inbound()
        listener.full = True  # the third is not even taken
        time.sleep(0.3)
        listener.link.stop()
        again = Listener(mosquitto)
        try:
            again.up()
            assert [again.inbound().frame for _ in range(2)] == [encode(end(1)), encode(end(2))]
            stale.acknowledge()  # of a connection that is gone: without effect
        finally:
            again.link.stop()


def test_what_there_was_no_room_for_comes_once_there_is(mosquitto: BrokerProcess) -> None:
    listener = Listener(mosquitto)
    with Hub(mosquitto) as hub:
        listener.subscribed(hub)
        listener.full = True
        # More than the broker's window: it must not stay shut for good.
        frames = [encode(end(number)) for number in range(RECEIVE_MAXIMUM + 8)]
        for frame in frames:
            hub.send_raw("barn-1", frame)
        listener.next(LinkDown)
        listener.full = False
        heard: set[bytes] = set()
        while len(heard) < len(frames):
            event = listener.next(Inbound)
            assert isinstance(event, Inbound)
            heard.add(event.frame)
            event.acknowledge()
        assert heard == set(frames)
    listener.link.stop()


CONNACK = bytes((0x20, 2, 0, 0))
PUBLISH_WITHOUT_UTF8 = bytes((0x30, 5, 0, 2, 0xC3, 0x28, 0))


@pytest.mark.parametrize("answer", [CONNACK + PUBLISH_WITHOUT_UTF8, CONNACK + b"\xf0" + 5 * b"\xff"])
def test_what_paho_does_not_expect_costs_one_connection(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        address = BrokerAddress("127.0.0.1", server.getsockname()[1], tls=False)
        settings = LinkSettings("barn-1", address, version="3.1.1", first_delay=0.05, max_delay=0.1)
        link = MqttLink(settings, lambda _: True)
        link.start()
        try:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(120)
                    assert connection.recv(1)[0] == 0x10  # CONNECT
                    connection.sendall(answer)
                    # The device leaves, and not the broker.
                    while connection.recv(4096):
                        pass
        finally:
            link.stop()


@pytest.mark.parametrize(("version", "said"), [("5", "5"), ("3.1.1", "3.1.1")])
def test_a_version_can_be_chosen(mosquitto: BrokerProcess, version: MqttVersion, said: str) -> None:
    listener = Listener(mosquitto, version=version)
    assert listener.up().version == said
    listener.link.stop()


def test_a_silent_port_is_given_up_and_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        address = BrokerAddress("127.0.0.1", server.getsockname()[1], tls=False)
        link = MqttLink(
            LinkSettings("barn-1", address, version="5", first_delay=0.05, max_delay=0.1),
            lambda event: events.put(event) is None,
        )
        link.start()
        server.settimeout(60)
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                connection.settimeout(60)
                assert connection.recv(1)[0] == 0x10  # CONNECT
        link.stop()
        assert events.empty()


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (socket, "create_connection", OSError(errno.EMFILE, "Too many open files")),
        (paho, "_socketpair_compat", OSError(errno.EMFILE, "Too many open files")),
    ],
)
def test_a_machine_short_of_files_is_waited_for(
    mosquitto: BrokerProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    error: Exception,
) -> None:
    caplog.set_level("INFO", "covey.edge.mqtt")
    working = getattr(owner, name)
    left = iter(range(2))

    def failing(*args: Any, **others: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return working(*args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        listener = Listener(mosquitto)
        # Still MQTT 5: the broker is not to blame.
        assert listener.up().version == "5"
    assert next(left, None) is None
    assert any(str(error) in record.getMessage() for record in caplog.records)
    listener.link.stop()


def test_no_error_ends_the_thread_that_connects(
    mosquitto: BrokerProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = iter(range(2))

    def failing(*arguments: Any, **others: Any) -> paho.Client:
        if next(left, None) is not None:
            raise MemoryError
        return paho.Client(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr("edge_client.adapters.mqtt.paho", SimpleNamespace(**(vars(paho) | {"Client": failing})))
        listener = Listener(mosquitto)
        listener.up()
    listener.link.stop()
    assert [record.getMessage() for record in caplog.records].count("link-failed") == 2


def test_delays_grow_with_jitter_and_stay_bounded() -> None:
    for failures in range(30):
        ceiling = min(60.0, 0.5 * 2.0 ** min(failures, 16))
        delays = [backoff(failures, 0.5, 60.0) for _ in range(50)]
        assert all(ceiling / 2 <= delay <= ceiling for delay in delays) and len(set(delays)) > 10


def test_addresses() -> None:
    assert str(BrokerAddress.parse("mqtts://hub.example")) == "mqtts://hub.example:8883"
    assert str(BrokerAddress.parse("mqtt://127.0.0.5:99")) == "mqtt://127.0.0.5:99"
    assert BrokerAddress.parse("mqtt://[::1]").loopback and BrokerAddress.parse("mqtt://localhost").loopback
    assert BrokerAddress.parse("mqtt://10.0.0.1", insecure=True).host == "10.0.0.1"
    for url in (
        "mqtt://hub.example",
        "mqtt://10.0.0.1",
        "mqtt://localhost.evil.example",
        "http://localhost",
        "localhost:1883",
        "mqtts://",
        "mqtts://user:word@hub",
        "mqtts://hub/path",
        "mqtts://hub:port",
        "mqtts://hub:99999",
        "mqtts://hub?x=1",
    ):
        with pytest.raises(InvalidAddress):
            BrokerAddress.parse(url)


def test_tls_files_that_are_missing_say_so(tmp_path: Path) -> None:
    settings = LinkSettings(
        "barn-1",
        BrokerAddress.parse("mqtts://hub.example"),
        TlsFiles(tmp_path / "ca.pem", tmp_path / "certificate.pem", tmp_path / "identity.pem"),
    )
    with pytest.raises(InvalidAddress, match=r"ca\.pem"):
        MqttLink(settings, lambda _: True)


def server_certificate(fleet: Fleet, directory: Path) -> tuple[Path, Path]:
    """A broker's certificate for 127.0.0.1, from the fleet's CA."""
    key = Ed25519PrivateKey.generate()
    now = dt.datetime.now(dt.UTC)
    issuer = x509.load_der_x509_certificate(fleet.ca)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(99)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(fleet.ca_key, algorithm=None)
    )
    paths = directory / "hub.pem", directory / "hub-key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


@contextmanager
def tls_broker(fleet: Fleet, directory: Path, *certificate: Path) -> Iterator[int]:
    """A mosquitto that takes the fleet's devices only, by mutual TLS; yields its port."""
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed")
    port = free_port()
    (directory / "fleet-ca.pem").write_text(ssl.DER_cert_to_PEM_cert(fleet.ca))
    configuration = directory / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nuser {getpass.getuser()}\nallow_anonymous true\n"
        f"cafile {directory / 'fleet-ca.pem'}\ncertfile {certificate[0]}\nkeyfile {certificate[1]}\n"
        "require_certificate true\nuse_identity_as_username true\n"
    )
    with subprocess.Popen([program, "-c", configuration], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: _listens(port))
            yield port
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_mutual_tls_with_the_identity_that_signs_rounds(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("barn-1", DevicePolicy())
    with tls_broker(fleet, tmp_path, *server_certificate(fleet, tmp_path)) as port:

        def attempt(files: TlsFiles, seconds: float) -> LinkUp | None:
            events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
            address = BrokerAddress.parse(f"mqtts://127.0.0.1:{port}")
            settings = LinkSettings("barn-1", address, files, first_delay=0.1, max_delay=0.2)
            link = MqttLink(settings, lambda event: events.put(event) is None)
            link.start()
            try:
                event = events.get(timeout=seconds)
            except queue.Empty:
                return None
            finally:
                link.stop()
            return event if isinstance(event, LinkUp) else None

        own = tls_files(state)
        up = attempt(own, 60)
        assert up is not None and up.version == "5"
        # A broker that shows a device's certificate, or one of another CA, is not the fleet's.
        stranger = Fleet(tmp_path / "other")
        stranger.directory.mkdir()
        foreign = tls_files(stranger.enrolled("barn-1", DevicePolicy()))
        assert attempt(TlsFiles(foreign.ca, own.certificate, own.key), 1.0) is None
        assert attempt(TlsFiles(own.ca, foreign.certificate, foreign.key), 1.0) is None


# --- whole processes -------------------------------------------------------------------------------------


def test_a_device_shrugs_off_garbage_and_leaves_a_will(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    fleet, watch = Fleet(tmp_path), zoo.load("watch")
    device = Device(fleet.enrolled("barn-1", DevicePolicy()), fleet.data("barn-1", watch.manifest), mosquitto)
    with Hub(mosquitto) as hub, running(device):
        wait_for(lambda: hub.online("barn-1"))
        for frame in (b"", b"\x00", b"\xff" * 5000, b"\x02\x00\x00\x00{}", encode(end(1)) + b"tail"):
            hub.send_raw("barn-1", frame)
        wait_for(lambda: "count=5" in device.log.read_text(), what="the count of malformed messages")
        device.kill()
        wait_for(lambda: not hub.online("barn-1"), what="the will")
        device.start()
        wait_for(lambda: hub.online("barn-1"))

        second = subprocess.run(
            command("run", "--state", device.state, "--broker", mosquitto.url, "--data", tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert second.returncode == 4 and "another covey-edge runs" in second.stderr
        assert device.stop() == 0
        wait_for(lambda: not hub.online("barn-1"))


def test_a_device_without_data_refuses_rounds_and_still_follows_models(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    fleet, watch = Fleet(tmp_path), zoo.load("watch")
    empty = tmp_path / "empty"
    empty.mkdir()
    device = Device(fleet.enrolled("barn-1", DevicePolicy()), empty, mosquitto)
    with Hub(mosquitto) as hub, running(device):
        weights = encode_weights(watch.weights.copy())
        hub.publish(watch.manifest, watch.graph, weights, fleet.operator)
        wait_for(lambda: hub.serving("barn-1") == {"watch": 1})
        Round(hub, fleet, ["barn-1"]).ask()
        device_id, message, _ = hub.heard.get(timeout=120)
        assert device_id == "barn-1" and isinstance(message, Refusal)
        assert message.code == "cohort-too-small" and "minimum_cohort is 5" in message.detail
