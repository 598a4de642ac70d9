"""Sources that record: what is kept of a sensor, what a power cut costs, and what a change of it does."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.adapters.files import StorageError
from edge_client.adapters.sources.iio import IioSampler, IioSettings, open_iio
from edge_client.adapters.sources.recorded import RecordedSettings, RecordedSource, Sample, SensorError
from edge_client.adapters.sources.recordings import (
    DATABASE,
    Recordings,
    RecordingSchema,
    Retention,
    SchemaChanged,
)
from edge_client.configuration import InvalidConfiguration
from edge_client.home_assistant import InvalidDiscovery, Place, entities
from edge_client.windows import Readings, ReadingsBuilder
from models.examples import InvalidExamples
from tests.edge_broker import wait_for
from tests.unit.test_edge_sources import taking

SCHEMA = RecordingSchema(("a", "b"), 1.0, {})
ALL = Retention(10**9)


def batch(start: float, count: int, label: str | None = "left") -> Readings:
    builder = ReadingsBuilder(2, 10_000)
    for i in range(count):
        builder.add(start + i, [start + i, -1.0], label)
    return builder.readings()


# --- the file --------------------------------------------------------------------------------------------


def test_batches_come_back_in_order_with_their_labels(tmp_path: Path) -> None:
    with Recordings.open(tmp_path / "r") as recordings:
        recordings.append(SCHEMA, batch(0, 3, "left"), ALL)
        recordings.append(SCHEMA, batch(3, 3, None), ALL)
        recordings.append(SCHEMA, batch(6, 3, "right"), ALL)
    with Recordings.open(tmp_path / "r", read_only=True) as recordings:
        found = recordings.read(2, 100)
        assert recordings.count() == len(found) == 9
        assert found.times.tolist() == found.values[:, 0].tolist() == list(range(9))
        said = [found.names[code] if code >= 0 else None for code in found.codes]
        assert said == ["left"] * 3 + [None] * 3 + ["right"] * 3
        # Whole batches, until there are enough.
        assert recordings.read(2, 4).times.tolist() == [3, 4, 5, 6, 7, 8]
    assert stat.S_IMODE((tmp_path / "r" / DATABASE).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o700


def test_old_and_too_many_batches_go_and_the_file_stays_bounded(tmp_path: Path) -> None:
    each = 100 * (8 + 8 + 4)
    sizes = []
    with Recordings.open(tmp_path) as recordings:
        for number in range(400):
            recordings.append(SCHEMA, batch(100.0 * number, 100), Retention(5 * each))
            sizes.append((tmp_path / DATABASE).stat().st_size)
        assert recordings.count() == 500
        assert recordings.read(2, 10_000).times[0] == 100 * 395
        assert max(sizes[50:]) <= sizes[20] + 65_536
        recordings.append(SCHEMA, batch(40_000, 100), Retention(10**9, oldest=39_800))
        assert recordings.read(2, 10_000).times[0] == 39_800
        # One that is larger than all that may be kept is kept until the next.
        recordings.append(SCHEMA, batch(50_000, 100), Retention(1))
        assert recordings.count() == 100


def test_more_labels_than_a_model_can_have_are_none(tmp_path: Path) -> None:
    builder = ReadingsBuilder(2, 10_000)
    for number in range(3000):
        builder.add(float(number), [0.0, 0.0], f"label-{number}")
    with Recordings.open(tmp_path) as recordings:
        recordings.append(SCHEMA, builder.readings(), ALL)
        found = recordings.read(2, 3000)
    assert len(found.names) == 1024
    assert (found.codes[:1024] == np.arange(1024)).all() and (found.codes[1024:] == -1).all()


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        (RecordingSchema(("a", "c"), 1.0, {}), "a, b, now they are a, c"),
        (RecordingSchema(("b", "a"), 1.0, {}), "now they are b, a"),
        (RecordingSchema(("a", "b"), 0.5, {}), r"every 1 s, now every 0\.5 s"),
        (RecordingSchema(("a", "b"), 1.0, {"b": "°F"}), "'°C', now it is in '°F'"),
    ],
)
def test_what_changed_is_not_mixed_with_what_was(tmp_path: Path, schema: RecordingSchema, match: str) -> None:
    with Recordings.open(tmp_path) as recordings:
        recordings.append(SCHEMA, batch(0, 3), ALL)
        # A unit may become known later, and be unknown again.
        recordings.append(RecordingSchema(("a", "b"), 1.0, {"b": "°C"}), batch(3, 3), ALL)
        recordings.append(SCHEMA, batch(6, 3), ALL)
        with pytest.raises(SchemaChanged, match=match) as failed:
            recordings.append(schema, batch(9, 3), ALL)
        assert "covey-edge reset --recordings" in str(failed.value)
        assert recordings.count() == 9


def test_what_is_no_recording_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection, connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(StorageError, match="no recording"):
        Recordings.open(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"rot" * 1000)
    with pytest.raises(StorageError):
        Recordings.open(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == b"rot" * 1000


def test_a_kill_at_any_moment_leaves_whole_batches(tmp_path: Path) -> None:
    """SIGKILL of a process that does nothing but write; what it said it wrote is there, in order."""
    code = (
        "import sys; from pathlib import Path\n"
        "from edge_client.adapters.sources.recordings import Recordings, RecordingSchema, Retention\n"
        "from edge_client.windows import ReadingsBuilder\n"
        "start, schema = int(sys.argv[2]), RecordingSchema(('a', 'b'), 1.0, {})\n"
        "while True:\n"
        "    batch = ReadingsBuilder(2, 100)\n"
        "    for i in range(start, start + 10):\n"
        "        batch.add(float(i), [float(i), 0.0], 'left')\n"
        "    with Recordings.open(Path(sys.argv[1])) as recordings:\n"
        "        recordings.append(schema, batch.readings(), Retention(200 * 50))\n"
        "    start += 10\n"
        "    print(start, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = 0
    for delay in (0.0, 0.011, 0.037):
        argv = [sys.executable, "-c", code, str(tmp_path), str(start)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(30)]
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read().splitlines(keepends=True)
        last = int([line for line in said if line.endswith("\n")][-1])
        with Recordings.open(tmp_path) as recordings:
            times = recordings.read(2, 10_000).times
        # It may have been killed between writing and saying so.
        assert times[-1] in (last - 1, last + 9) and len(times) == min(500, times[-1] + 1)
        assert (np.diff(times) == 1).all()
        start = int(times[-1]) + 1


# --- recording -------------------------------------------------------------------------------------------


class Thermometer:
    """A sensor that shows what the test says."""

    def __init__(self) -> None:
        self.show: Callable[[int], Sample] = lambda i: Sample((float(i), 1.0), "left")
        self.unit, self.looks = "°C", 0

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def units(self) -> dict[str, str]:
        return {"a": self.unit}

    def sample(self, steady: float) -> Sample:
        self.looks += 1
        return self.show(self.looks)


def source(directory: Path, sensor: Thermometer, **keys: Any) -> RecordedSource:
    given = {"channels": ["a", "b"], "label": "l", "period_seconds": 0.005} | keys
    return RecordedSource(RecordedSettings.of(given, "data"), directory, sensor)


def record(directory: Path, sensor: Thermometer, count: int = 30, **keys: Any) -> RecordedSource:
    recorder, end = source(directory, sensor, **keys), sensor.looks + count
    recorder.start()
    wait_for(lambda: sensor.looks >= end)
    recorder.stop()
    return recorder


def test_what_was_recorded_is_trained_on_also_by_a_later_process(tmp_path: Path) -> None:
    directory, sensor = tmp_path / "thermo", Thermometer()
    fault = source(directory, sensor).fault()
    assert fault is not None and fault.code == "no-data"
    with pytest.raises(InvalidExamples, match="nothing was recorded"):
        source(directory, sensor).load(taking(2, 2))
    assert record(directory, sensor).fault() is None
    record(directory, sensor)
    later = source(directory, sensor, max_gap_seconds=60, stride=1)
    assert later.fault() is None
    found = later.load(taking(2, 2))
    assert len(found) >= 50 and found.x[0].tolist() == [[1, 1], [2, 1]]
    assert found.x[:, 0, 0].tolist() == list(range(1, len(found) + 1))


def test_a_sensor_that_fails_leaves_a_hole_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sensor = Thermometer()

    def show(look: int) -> Sample:
        if 10 <= look < 20:
            raise SensorError("unplugged")
        return Sample((math.nan if look == 25 else float(look), 1.0), None if look == 27 else "left")

    sensor.show = show
    found = record(tmp_path, sensor, 40, max_gap_seconds=60, stride=1).load(taking(1, 2))
    seen = found.x[:, 0, 0].tolist()
    assert seen[:20] == [*range(1, 10), *range(20, 25), 26, *range(28, 33)]
    assert caplog.text.count("sensor-unreadable") == 1 and "unplugged" in caplog.text


def test_another_unit_stops_the_recording_until_the_owner_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sensor = Thermometer()
    record(tmp_path, sensor)
    with Recordings.open(tmp_path, read_only=True) as recordings:
        before = recordings.count()
    sensor.unit = "°F"
    recorder = record(tmp_path, sensor)
    fault = recorder.fault()
    assert fault is not None and fault.code == "schema-changed" and "°" not in fault.detail
    with pytest.raises(InvalidExamples, match="'°C', now it is in '°F'"):
        recorder.load(taking(2, 2))
    with Recordings.open(tmp_path, read_only=True) as recordings:
        assert recordings.count() == before
    assert "covey-edge reset --recordings" in caplog.text
    sensor.unit = "°C"
    assert record(tmp_path, sensor).fault() is None


def test_a_disk_that_refuses_costs_nothing_that_fits_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The recording's place is taken by a file; when it is free again, what waited is written."""
    directory, sensor = tmp_path / "thermo", Thermometer()
    directory.write_text("in the way")
    recorder = source(directory, sensor, flush_seconds=1, stride=1, max_gap_seconds=60)
    recorder.start()
    wait_for(lambda: "recording-not-written" in caplog.text)
    directory.unlink()
    wait_for(lambda: (directory / DATABASE).exists() and recorder.fault() is None)
    recorder.stop()
    assert recorder.load(taking(1, 2)).x[:5, 0, 0].tolist() == [1, 2, 3, 4, 5]


# --- Industrial I/O --------------------------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two devices as Linux shows them: an accelerometer, and a sensor of the weather."""
    root = tmp_path / "devices"
    files = {
        "iio:device0/name": "lsm6ds3\n",
        "iio:device0/in_accel_x_raw": "100\n",
        "iio:device0/in_accel_y_raw": "-200\n",
        "iio:device0/in_accel_scale": "0.01\n",
        "iio:device0/in_accel_y_offset": "50\n",
        "iio:device1/name": "bme280\n",
        "iio:device1/in_temp_input": "21500\n",
        "iio:device1/in_voltage0_raw": "7\n",
        "iio:device1/in_voltage_scale": "2\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def iio(root: Path, **keys: Any) -> IioSettings:
    given = {"device": "lsm6ds3", "channels": ["accel_x", "accel_y"], "period_seconds": 0.01}
    return IioSettings.of(given | {"root": str(root), "label": str(root / "label.txt")} | keys, "data (iio)")


def test_iio_channels_are_scaled_as_the_kernel_says(sysfs: Path) -> None:
    sampler = IioSampler(iio(sysfs))
    assert sampler.sample(0.0) == Sample((1.0, -1.5), None)
    (sysfs / "label.txt").write_text("squat\n")
    (sysfs / "iio:device0" / "in_accel_x_raw").write_text("300\n")
    assert sampler.sample(0.0) == Sample((3.0, -1.5), "squat")
    weather = iio(sysfs, device="bme280", channels=["temp"], targets=["voltage0"], label=None)
    assert IioSampler(weather).sample(0.0) == Sample((21500.0, 14.0), None)
    assert IioSampler(iio(sysfs, device="iio:device1", channels=["temp"])).sample(0.0).values == (21500.0,)


def test_iio_troubles_are_named_and_pass(sysfs: Path) -> None:
    sampler = IioSampler(iio(sysfs))
    path = sysfs / "iio:device0" / "in_accel_x_raw"
    path.write_text("\n")
    with pytest.raises(SensorError, match="in_accel_x_raw holds no number"):
        sampler.sample(0.0)
    path.unlink()
    with pytest.raises(SensorError, match="has no channel accel_x; it has accel_y"):
        sampler.sample(0.0)
    path.write_text("100\n")
    assert sampler.sample(0.0).values == (1.0, -1.5)
    with pytest.raises(SensorError, match=r"called bmp; there are: lsm6ds3 \(iio:device0\), bme280"):
        IioSampler(iio(sysfs, device="bmp")).sample(0.0)
    with pytest.raises(SensorError, match="no channel"):
        IioSampler(iio(sysfs, channels=["../../x"])).sample(0.0)
    with pytest.raises(InvalidConfiguration, match="device"):
        iio(sysfs, device="../x")


def test_iio_readings_become_examples(sysfs: Path, tmp_path: Path) -> None:
    given = iio(sysfs).model_dump() | {"max_gap_seconds": 60.0}
    recorder = open_iio(given, tmp_path / "iio")
    (sysfs / "label.txt").write_text("right")
    recorder.start()
    wait_for(lambda: len(recorder._batch) >= 12)
    recorder.stop()
    found = recorder.load(taking(4, 2))
    assert set(found.y.tolist()) == {1}
    assert found.x[0].tolist() == [[1.0, -1.5]] * 4


# --- Home Assistant's announcements ----------------------------------------------------------------------


def test_announcements_long_and_short() -> None:
    long = {
        "unique_id": "kitchen_t",
        "state_topic": "zigbee/kitchen",
        "value_template": "{{ value_json.temperature }}",
        "unit_of_measurement": "°C",
        "expire_after": 60,
        "availability": [{"topic": "zigbee/state", "value_template": "{{ value_json['state'] }}"}],
    }
    short = {
        "~": "zigbee",
        "uniq_id": "kitchen_t",
        "stat_t": "~/kitchen",
        "val_tpl": "{{ value_json['temperature'] | float(0) | round(1) }}",
        "unit_of_meas": "°C",
        "exp_aft": 60,
        "avty": {"t": "~/state", "val_tpl": '{{value_json["state"]}}'},
    }
    (first,), (second,) = (
        entities("homeassistant/sensor/0x12/temperature/config", json.dumps(each).encode())
        for each in (long, short)
    )
    assert first == second and first.names == {"kitchen_t", "temperature"}
    assert first.number(b'{"temperature": 21.26}') == 21.26
    for payload in (b"{}", b"21", b"[1", b"\xff", b'{"temperature": "unknown"}', b'{"temperature": null}'):
        assert math.isnan(first.number(payload))
    assert first.availability[0].place.text(b'{"state": "offline"}') == first.availability[0].unavailable


def test_all_components_of_a_device_in_one_announcement() -> None:
    content = {
        "device": {"name": "weather"},
        "state_topic": "weather/state",
        "components": {
            "t": {"p": "sensor", "unique_id": "w_t", "value_template": "{{ value_json.t[1] }}"},
            "rain": {"p": "binary_sensor", "unique_id": "w_r", "stat_t": "weather/rain", "pl_on": "wet"},
            "gone": {"p": "sensor"},
        },
    }
    first, second = entities("homeassistant/device/weather/config", json.dumps(content).encode())
    assert first.names == {"w_t", "t"} and first.number(b'{"t": [1, 2.5]}') == 2.5
    assert second.state == "weather/rain"
    assert (second.number(b"wet"), second.number(b"OFF")) == (1.0, 0.0)
    assert entities("homeassistant/device/weather/config", b"") == ()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b"{" + b" " * 70_000 + b"}",
        b'{"unique_id": "a"}',
        b'{"state_topic": "#"}',
        b'{"state_topic": "a/+/b"}',
        b'{"state_topic": 7}',
        b'{"state_topic": "a", "value_template": "{{ value_json.a * 2 }}"}',
        b'{"state_topic": "a", "value_template": "{% if value %}1{% endif %}"}',
        b'{"components": []}',
    ],
)
def test_announcements_that_cannot_be_used(content: bytes) -> None:
    with pytest.raises(InvalidDiscovery):
        entities("homeassistant/sensor/a/config", content)


def test_a_template_names_a_place_or_the_whole() -> None:
    assert Place.of(None) == Place.of("{{ value }}") == Place.of("{{value|float}}") == Place()
    assert Place.of("{{ value_json }}").text(b"21.5") == "21.5"
    assert Place.of("{{ value_json.a['b c'][0].d }}").steps == ("a", "b c", 0, "d")
    assert Place.of("{{ value_json.on }}").text(b'{"on": true}') == "true"
