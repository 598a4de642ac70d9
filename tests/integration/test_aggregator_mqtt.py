"""The aggregator's connection to real brokers: what is not acknowledged comes again, and nothing piles up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from aggregator.adapters import mqtt
from aggregator.adapters.mqtt import MqttTransport
from aggregator.transport import Connected, Delivery, Disconnected, Inbound
from deploy.broker import BrokerProcess
from protocol import topics
from protocol.broker_address import BrokerAddress

TOPIC = topics.up("barn-1", "msg")


class Device:
    """A plain client that sends, and keeps what it gets."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.got: list[tuple[str, bytes, bool]] = []
        subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="barn-1")
        self._client.on_message = lambda _, __, m: self.got.append((m.topic, bytes(m.payload), m.retain))
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        self._client.subscribe([(topics.downlinks("barn-1"), 1), (topics.MODELS, 1)])
        assert subscribed.wait(120)

    def say(self, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(TOPIC, payload, qos=1, retain=retain).wait_for_publish(60)

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def transport(broker: BrokerProcess) -> Iterator[MqttTransport]:
    transport = MqttTransport(BrokerAddress.parse(broker.url), "covey-aggregator-test")
    transport.start()
    yield transport
    transport.stop()


@pytest.fixture
def device(broker: BrokerProcess) -> Iterator[Device]:
    device = Device(broker)
    yield device
    device.stop()


def until(transport: MqttTransport, done: Callable[[list[Inbound]], bool]) -> list[Inbound]:
    """Receives until `done`; acknowledges nothing."""
    got: list[Inbound] = []
    end = time.monotonic() + 120
    while not done(got):
        assert time.monotonic() < end, got
        got += transport.receive(10, 0.05)
    return got


def connect(transport: MqttTransport) -> None:
    """Until the transport is connected and its subscription is there: then it hears what it says itself."""
    assert until(transport, bool)[0] == Connected()
    for number in range(60):
        probe, heard = b"probe %d" % number, False
        assert transport.publish(topics.up("probe", "msg"), probe)
        # When the last one has come, no earlier one is on its way any more.
        while not heard and (batch := transport.receive(10, 1.0)):
            for delivery in batch:
                assert isinstance(delivery, Delivery)
                transport.acknowledge(delivery)
                heard = heard or delivery.payload == probe
        if heard:
            return
    raise AssertionError("the transport hears nothing")


def payloads(got: list[Inbound]) -> list[bytes]:
    return [item.payload for item in got if isinstance(item, Delivery)]


def test_messages_go_both_ways(transport: MqttTransport, device: Device) -> None:
    connect(transport)
    device.say(b"hello")
    (delivery,) = until(transport, bool)
    assert isinstance(delivery, Delivery)
    assert (delivery.topic, delivery.payload) == (TOPIC, b"hello")
    transport.acknowledge(delivery)
    assert transport.publish(topics.down("barn-1", "msg"), b"answer")
    assert transport.publish(topics.model("watch"), b"version", retain=True)
    end = time.monotonic() + 120
    while len(device.got) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert {(topic, payload) for topic, payload, _ in device.got} == {
        (topics.down("barn-1", "msg"), b"answer"),
        (topics.model("watch"), b"version"),
    }


def test_what_is_not_acknowledged_comes_again(mosquitto: BrokerProcess) -> None:
    transport = MqttTransport(BrokerAddress.parse(mosquitto.url), "covey-aggregator-test")
    device = Device(mosquitto)
    transport.start()
    try:
        connect(transport)
        device.say(b"first")
        device.say(b"second")
        got = until(transport, lambda items: len(payloads(items)) == 2)
        for item in got:
            if isinstance(item, Delivery) and item.payload == b"first":
                transport.acknowledge(item)
        time.sleep(0.3)
        transport.reset()
        again = until(transport, lambda items: bool(payloads(items)))
        assert [type(item) for item in again[:2]] == [Disconnected, Connected]
        assert payloads(again) == [b"second"]
        transport.acknowledge(
            next(item for item in got if isinstance(item, Delivery))
        )  # of the old connection
    finally:
        transport.stop()
        device.stop()


def test_what_paho_does_not_expect_costs_one_connection() -> None:
    connack, not_utf8 = bytes((0x20, 3, 0, 0, 0)), bytes((0x30, 6, 0, 2, 0xC3, 0x28, 0, 0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        transport = MqttTransport(BrokerAddress("127.0.0.1", port, tls=False), "covey-aggregator-test")
        transport.start()
        try:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(30)
                    assert connection.recv(1)[0] == 0x10  # CONNECT
                    connection.sendall(connack + not_utf8)
                    # The service leaves, and not the broker.
                    while connection.recv(4096):
                        pass
        finally:
            transport.stop()


def test_it_comes_back_when_the_broker_does(mosquitto: BrokerProcess) -> None:
    transport = MqttTransport(BrokerAddress.parse(mosquitto.url), "covey-aggregator-test")
    transport.start()
    try:
        connect(transport)
        mosquitto.kill()
        assert until(transport, bool)[0] == Disconnected()
        assert not transport.publish(topics.model("watch"), b"x")
        mosquitto.restart()
        assert until(transport, bool)[0] == Connected()
    finally:
        transport.stop()


def test_a_main_loop_that_is_stuck_bounds_what_waits(
    mosquitto: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the queue, messages stay at the broker; they come when the loop goes on."""
    monkeypatch.setattr(mqtt, "QUEUE_LIMIT", 20)
    monkeypatch.setattr(mqtt, "HANDOVER_SECONDS", 0.5)
    transport = MqttTransport(BrokerAddress.parse(mosquitto.url), "covey-aggregator-test")
    device = Device(mosquitto)
    transport.start()
    try:
        connect(transport)
        for number in range(100):
            device.say(number.to_bytes(2, "big"))
        time.sleep(1.5)
        assert transport._inbound.qsize() <= 20
        seen: set[bytes] = set()
        end = time.monotonic() + 30
        while len(seen) < 100:
            assert time.monotonic() < end, len(seen)
            for item in transport.receive(10, 0.05):
                if isinstance(item, Delivery):
                    seen.add(item.payload)
                    transport.acknowledge(item)
    finally:
        transport.stop()
        device.stop()


def test_stopping_leaves_no_thread(broker: BrokerProcess) -> None:
    before = threading.active_count()
    transport = MqttTransport(BrokerAddress.parse(broker.url), "covey-aggregator-test")
    transport.start()
    connect(transport)
    transport.stop()
    assert threading.active_count() == before


def test_nobody_there_is_no_error() -> None:
    transport = MqttTransport(BrokerAddress("127.0.0.1", 9, False), "covey-aggregator-test")
    transport.start()
    assert transport.receive(10, 0.5) == []
    assert not transport.publish(topics.model("watch"), b"x")
    transport.stop()
