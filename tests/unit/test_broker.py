"""The private broker: it serves, forgets nothing it need not, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from deploy import broker as broker_module
from deploy.broker import BrokerError, BrokerKind, BrokerProcess, choose_kind, find_mosquitto

_NO_MOSQUITTO = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
KINDS = [pytest.param("mosquitto", marks=_NO_MOSQUITTO), "amqtt"]


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sends every temporary file of the test to a folder of its own, to see what stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    """Each kind of broker that is installed."""
    if request.param == "amqtt":
        pytest.importorskip("amqtt")
    kind: BrokerKind = request.param
    return kind


@pytest.fixture
def broker(kind: BrokerKind) -> Iterator[BrokerProcess]:
    """A running broker."""
    with BrokerProcess(kind) as process:
        yield process


def receive_one(broker: BrokerProcess, topic: str, publish: bytes | None = None) -> bytes:
    """Subscribes, publishes when asked to, and returns the first message on `topic`."""
    received: Queue[bytes] = Queue()
    subscribed: Queue[None] = Queue()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="test", protocol=mqtt.MQTTv311)
    client.on_message = lambda client, data, message: received.put(bytes(message.payload))
    client.on_subscribe = lambda *arguments: subscribed.put(None)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        client.subscribe(topic, qos=1)
        subscribed.get(timeout=120)
        if publish is not None:
            client.publish(topic, publish, qos=1, retain=True).wait_for_publish(60)
        return received.get(timeout=120)
    finally:
        client.disconnect()
        client.loop_stop()


def wait_until_gone(pid: int) -> None:
    """Waits until no process `pid` runs; a zombie counts as gone."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_broker_carries_a_large_message(broker: BrokerProcess) -> None:
    payload = os.urandom(256 * 1024)
    assert receive_one(broker, "covey/test", publish=payload) == payload
    assert broker.url == f"mqtt://127.0.0.1:{broker.port}"


def test_broker_listens_on_one_loopback_address_only(broker: BrokerProcess) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", broker.port), timeout=5)


def test_killed_broker_restarts_on_its_port(broker: BrokerProcess) -> None:
    port, first_pid = broker.port, broker.pid
    broker.kill()
    assert not broker.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((broker.host, port), timeout=5)
    broker.restart()
    assert (broker.port, broker.running) == (port, True)
    assert broker.pid != first_pid
    assert receive_one(broker, "covey/test", publish=b"again") == b"again"


@_NO_MOSQUITTO
def test_mosquitto_keeps_retained_messages_over_a_restart() -> None:
    with BrokerProcess("mosquitto") as broker:
        receive_one(broker, "covey/test", publish=b"kept")
        broker.restart()
        assert receive_one(broker, "covey/test") == b"kept"


def test_leaving_the_context_leaves_no_process_port_or_file(kind: BrokerKind, temporary_files: Path) -> None:
    with BrokerProcess(kind) as broker:
        pid, port = broker.pid, broker.port
        assert list(temporary_files.iterdir())
    wait_until_gone(pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert not list(temporary_files.iterdir())


def test_broker_dies_with_its_parent(kind: BrokerKind) -> None:
    script = (
        "import sys, time\n"
        "from deploy.broker import BrokerProcess\n"
        f"with BrokerProcess({kind!r}) as broker:\n"
        "    print(broker.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    wait_until_gone(pid)


def test_taken_port_is_named(kind: BrokerKind, temporary_files: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=str(port)), BrokerProcess(kind, port=port):
            pass
    assert not list(temporary_files.iterdir())


def test_auto_takes_amqtt_where_mosquitto_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: None)
    assert choose_kind("auto") == "amqtt"
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        choose_kind("mosquitto")


def test_broker_that_ends_at_once_is_reported_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: "/bin/false")
    with pytest.raises(BrokerError, match="ended with code 1"), BrokerProcess("mosquitto"):
        pass
