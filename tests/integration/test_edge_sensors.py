"""Sensors at a real MQTT broker, announced as Home Assistant's are, recorded by a real device process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from deploy.broker import BrokerProcess
from edge_client.adapters.sources.mqtt_sensors import MqttSampler, MqttSettings, open_mqtt
from edge_client.adapters.sources.recorded import RecordedSource, SensorError
from edge_client.adapters.sources.recordings import DATABASE, Recordings
from edge_client.configuration import InvalidConfiguration
from models import zoo
from tests.edge_broker import Device, Fleet, Hub, running, wait_for
from tests.edge_fleet import PERMISSIVE
from tests.unit.test_edge_sources import taking


class House:
    """What else is at the owner's broker: sensors, and what they say."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    def say(self, topic: str, payload: object, *, retain: bool = False) -> None:
        text = payload if isinstance(payload, str) else json.dumps(payload)
        info = self._client.publish(topic, text, qos=1, retain=retain)
        if info.rc == paho.MQTT_ERR_SUCCESS:  # else the broker is away, and it is sent later
            info.wait_for_publish(60)

    def announce(self, name: str, **more: Any) -> None:
        """Announces a sensor of the kitchen, whose value is in the common JSON message."""
        content = {
            "unique_id": f"kitchen_{name}",
            "state_topic": "zigbee/kitchen",
            "value_template": f"{{{{ value_json.{name} }}}}",
            "availability_topic": "zigbee/kitchen/available",
            **more,
        }
        self.say(f"homeassistant/sensor/0x12/{name}/config", content, retain=True)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def at_home(broker: BrokerProcess) -> Iterator[House]:
    house = House(broker)
    try:
        yield house
    finally:
        house.close()


def keys(broker: BrokerProcess, **more: Any) -> dict[str, Any]:
    return {
        "broker": broker.url,
        "channels": ["kitchen_temperature", "kitchen_humidity"],
        "label": "presence",
        "classes": {"ON": "left", "OFF": "right"},
        "period_seconds": 0.02,
        "max_gap_seconds": 60.0,
    } | more


@contextmanager
def sampling(broker: BrokerProcess, **more: Any) -> Iterator[MqttSampler]:
    sampler = MqttSampler(MqttSettings.of(keys(broker, **more), "data"))
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stop()


def values(sampler: MqttSampler, steady: float | None = None) -> tuple[float, ...] | None:
    try:
        return sampler.sample(time.monotonic() if steady is None else steady).values
    except SensorError:
        return None


def test_states_are_followed_through_what_a_house_does(mosquitto: BrokerProcess) -> None:
    nan = np.nan
    with at_home(mosquitto) as house, sampling(mosquitto) as sampler:
        with pytest.raises(SensorError, match=r"kitchen_humidity, kitchen_temperature, presence at .*nobody"):
            sampler.sample(0.0)

        def shows(*expected: float) -> None:
            wait_for(
                lambda: np.array_equal(values(sampler) or (), expected, equal_nan=True), 60, str(expected)
            )

        house.announce("temperature", unit_of_measurement="°C")
        shows(nan, nan)
        house.announce("humidity", unit_of_measurement="%")
        wait_for(lambda: len(sampler.units()) == 2)
        house.say("zigbee/kitchen", {"temperature": 21.5, "humidity": 40, "battery": 97})
        shows(21.5, 40.0)
        house.say("zigbee/kitchen", {"temperature": "unknown", "humidity": 41})
        shows(nan, 41.0)
        house.say("zigbee/kitchen", {"temperature": 22, "humidity": 41})
        shows(22.0, 41.0)
        house.say("zigbee/kitchen/available", "offline")
        shows(nan, nan)
        house.say("zigbee/kitchen/available", "online")
        shows(22.0, 41.0)
        # What was not repeated for an hour is not known any more.
        assert np.isnan(values(sampler, time.monotonic() + 3700) or (0.0,)).all()
        # A broker that goes forgets nothing that is announced, and takes every state with it.
        mosquitto.restart()
        shows(nan, nan)
        wait_for(lambda: _said(house, sampler), what="a state after the restart")
        assert sampler.units() == {"kitchen_temperature": "°C", "kitchen_humidity": "%"}
        # One that is taken back is not followed any more.
        house.say("homeassistant/sensor/0x12/humidity/config", "", retain=True)
        wait_for(lambda: np.isnan((values(sampler) or (0, 0))[1]))


def _said(house: House, sampler: MqttSampler) -> bool:
    house.say("zigbee/kitchen", {"temperature": 20, "humidity": 50})
    return values(sampler) == (20.0, 50.0)


def test_hostile_messages_change_nothing(mosquitto: BrokerProcess, caplog: pytest.LogCaptureFixture) -> None:
    with at_home(mosquitto) as house, sampling(mosquitto) as sampler:
        house.announce("temperature")
        house.announce("humidity")
        assert _settles(house, sampler)
        house.say("homeassistant/sensor/0x12/kitchen_humidity/config", "[" * 60_000)
        house.say("homeassistant/sensor/presence/config", {"state_topic": "#", "unique_id": "presence"})
        house.say("zigbee/kitchen", "x" * 300_000)
        house.say("zigbee/kitchen", "[" * 60_000)
        house.say("zigbee/kitchen", {"temperature": 1e999, "humidity": [1]})
        assert _settles(house, sampler)
    assert caplog.text.count("announcement-unusable") == 2 and "Traceback" not in caplog.text


def _settles(house: House, sampler: MqttSampler) -> bool:
    wait_for(lambda: _said(house, sampler))
    return True


def test_a_recording_of_a_house_trains(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    with at_home(mosquitto) as house:
        house.announce("temperature", unit_of_measurement="°C")
        house.announce("humidity")
        house.say("homeassistant/binary_sensor/presence/config", {"state_topic": "hall/pir"}, retain=True)
        source: RecordedSource = open_mqtt(keys(mosquitto), tmp_path / "house")
        source.start()

        def sees(presence: str, temperature: float) -> bool:
            house.say("hall/pir", presence)
            house.say("zigbee/kitchen", {"temperature": temperature, "humidity": 40})
            try:
                seen = source._sampler.sample(time.monotonic())
            except SensorError:
                return False
            return (seen.values, seen.label) == ((temperature, 40.0), presence)

        for presence, temperature in (("ON", 22.5), ("OFF", 18.0)):
            wait_for(lambda: sees(presence, temperature))  # noqa: B023
            before = len(source._batch)
            wait_for(lambda: len(source._batch) >= before + 12)  # noqa: B023
        source.stop()
    found = source.load(taking(4, 2))
    assert set(found.y.tolist()) == {0, 1}
    assert (found.x[found.y == 0][-1] == [22.5, 40]).all() and (found.x[found.y == 1][-1] == [18, 40]).all()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"broker": "mqtt://hub.example"}, "unencrypted"),
        ({"broker": "http://127.0.0.1"}, "no broker address"),
        ({"password_file": "/nowhere"}, "username"),
        ({"username": "me", "password_file": "/nowhere"}, "cannot be read"),
        ({"broker": "mqtts://hub.example", "ca": "/nowhere"}, "ca: /nowhere"),
        ({"discovery": "home/#"}, "discovery"),
    ],
)
def test_brokers_that_cannot_be(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    given = {"channels": ["a"], "label": "b", "period_seconds": 60, "broker": "mqtts://hub.example"} | more
    with pytest.raises(InvalidConfiguration, match=match):
        open_mqtt(given, tmp_path)


def test_a_device_records_while_it_runs_and_keeps_it_over_sigterm(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    """The whole process: edge.toml, recording beside the link to the fleet, the last batch at the end."""
    watch = zoo.load("watch").manifest
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("device-0", PERMISSIVE)
    root = tmp_path / "devices" / "iio:device0"
    root.mkdir(parents=True)
    (root / "name").write_text("imu\n")
    axes = [f"{kind}_{axis}" for kind in ("accel", "anglvel") for axis in "xyz"]
    for number, axis in enumerate(axes):
        (root / f"in_{axis}_raw").write_text(f"{number}\n")
    (tmp_path / "label").write_text(f"{watch.labels[2]}\n")
    (state / "edge.toml").write_text(
        f'[[data]]\nsource = "iio"\nroot = "{root.parent}"\ndevice = "imu"\nperiod_seconds = 0.01\n'
        f'channels = {json.dumps(axes)}\nlabel = "{tmp_path / "label"}"\n'
    )
    device = Device(state, None, mosquitto)
    with Hub(mosquitto) as hub, running(device):
        wait_for(lambda: hub.online("device-0"), what="the device")
        time.sleep(0.5)
        assert device.stop() == 0
    with Recordings.open(state / "data" / "iio", read_only=True) as recordings:
        readings = recordings.read(6, 10_000)
    assert len(readings) and readings.values[-1].tolist() == [0, 1, 2, 3, 4, 5]
    assert readings.names == (watch.labels[2],)
    assert (state / "data" / "iio" / DATABASE).stat().st_mode & 0o077 == 0
    assert "Traceback" not in device.log.read_text()
