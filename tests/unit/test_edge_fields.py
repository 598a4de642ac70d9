"""The fields that an owner declares, and a device's part in a query."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.active_round import WorkingNow
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.readings import MAX_FILE_BYTES, FieldReader, load_fields, save_fields
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.events import ConditionsChanged, Event, Fault, FieldRead, WorkFailed
from edge_client.fields import DeclaredFields, InvalidFields, UnreadableField, field_source
from edge_client.main import main
from edge_client.outputs import ReadField
from edge_client.policy import DevicePolicy
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.messages import AdvertiseKeys, ClientAbort, Refusal
from protocol.plan import HistogramQuestion, MeanQuestion, Plan, QueryTask
from tests.edge_fleet import PERMISSIVE, Aggregator, FakeDevice, invitation, plan

NO_NOISE = PrivacyParameters(
    mode=PrivacyMode.NONE, clip_norm=1.0, noise_multiplier=0.0, delta=1e-5, bits=32, rotation=False
)


def query_plan(**changes: Any) -> Plan:
    task = QueryTask(field="battery", low=0.0, high=80.0, question=MeanQuestion())
    return plan(task=task.model_copy(update=changes), privacy=NO_NOISE)


# --- sources


def test_sources_give_what_their_owner_said(tmp_path: Path) -> None:
    thermal = tmp_path / "temp"
    thermal.write_text("41500\n")
    log = tmp_path / "log"
    log.write_text("1 2\n9 4\n")
    for name, count in (("a.npz", 3), ("b.npz", 5)):
        np.savez(tmp_path / name, x=np.zeros((count, 8, 3), np.float32), y=np.zeros(count, np.int32))
    fields = DeclaredFields(fields={})
    for name, given in {
        "age": {"kind": "constant", "value": 7.5},
        "cpu": {"kind": "file", "path": str(thermal), "scale": 0.001},
        "last": {"kind": "file", "path": str(log)},
        "median": {"kind": "file", "path": str(log), "summary": "median"},
        "highest": {"kind": "file", "path": str(log), "summary": "max"},
        "examples": {"kind": "recordings"},
        "length": {"kind": "recordings", "scale": 2.5, "summary": "mean"},
    }.items():
        fields = fields.declare(name, field_source(given))
    save_fields(tmp_path, fields)
    reader = FieldReader(tmp_path, tmp_path)
    assert {name: reader.read(name) for name in reader.declared()} == {
        "age": 7.5,
        "cpu": 41.5,
        "last": 4.0,
        "median": 3.0,
        "highest": 9.0,
        "examples": 8.0,
        "length": 10.0,
    }
    assert (tmp_path / "fields.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "warm", "1 2 three", "9" * (MAX_FILE_BYTES + 1)])
def test_a_source_without_a_number_says_so_and_not_what_it_holds(tmp_path: Path, content: str) -> None:
    (tmp_path / "source").write_text(content)
    source = field_source({"kind": "file", "path": str(tmp_path / "source")})
    save_fields(tmp_path, DeclaredFields(fields={"battery": source}))
    with pytest.raises(UnreadableField) as refused:
        FieldReader(tmp_path, None).read("battery")
    assert "warm" not in str(refused.value) and "three" not in str(refused.value)


@pytest.mark.parametrize("summary", ["last", "mean", "median", "min", "max", "sum"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999"])
def test_no_summary_hides_a_reading_that_is_not_finite(tmp_path: Path, summary: str, bad: str) -> None:
    (tmp_path / "source").write_text(f"1 {bad} 3")
    source = field_source({"kind": "file", "path": str(tmp_path / "source"), "summary": summary})
    save_fields(tmp_path, DeclaredFields(fields={"battery": source}))
    assert not math.isfinite(FieldReader(tmp_path, None).read("battery"))


def test_recordings_that_cannot_be_read_are_no_reading(tmp_path: Path) -> None:
    save_fields(tmp_path, DeclaredFields(fields={"examples": field_source({"kind": "recordings"})}))
    reader = FieldReader(tmp_path, tmp_path)
    with pytest.raises(UnreadableField):
        reader.read("examples")  # none at all: not zero
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(UnreadableField):
        reader.read("examples")
    with pytest.raises(UnreadableField):
        reader.read("undeclared")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"fields": {"Battery": {"kind": "constant", "value": 1.0}}}',
        b'{"fields": {"battery": {"kind": "constant", "value": NaN}}}',
        b'{"fields": {"battery": {"kind": "shell", "command": "id"}}}',
        b'{"fields": {"battery": {"kind": "file", "path": "relative"}}}',
        b'{"fields": {"battery": {"kind": "file", "path": "/x", "summary": "mode"}}}',
        json.dumps({"fields": {f"f{i}": {"kind": "constant", "value": 1.0} for i in range(65)}}).encode(),
    ],
)
def test_a_file_that_declares_nothing_sensible_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidFields):
        DeclaredFields.from_bytes(data)


def test_the_owner_sets_lists_and_removes_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        code = main(["fields", *map(str, arguments), "--state", str(tmp_path)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    (tmp_path / "temp").write_text("41500")
    assert "answers no queries" in run()[1]
    assert run("set", "cpu", "--file", tmp_path / "temp", "--scale", 0.001)[0] == 0
    code, text = run("set", "battery", "--value", 3.5)
    assert code == 0 and "41.5" in text and "3.5" in text
    listed = json.loads(run("list", "--json")[1])["fields"]
    assert [(f["field"], f["value"]) for f in listed] == [("battery", 3.5), ("cpu", 41.5)]
    assert run("remove", "cpu")[0] == 0
    assert set(load_fields(tmp_path).fields) == {"battery"}
    for wrong in (("set", "x"), ("set",), ("set", "Bad Name", "--value", 1), ("remove", "cpu")):
        assert run(*wrong)[0] != 0
    assert run("set", "battery", "--value", "nan")[0] != 0
    assert set(load_fields(tmp_path).fields) == {"battery"}


def test_the_worker_reads_a_field_or_says_why_not(tmp_path: Path) -> None:
    events: list[Event] = []
    constant = field_source({"kind": "constant", "value": 21.5})
    missing = field_source({"kind": "file", "path": str(tmp_path / "none")})
    save_fields(tmp_path, DeclaredFields(fields={"battery": constant, "gone": missing}))
    with DeviceStore.open(tmp_path / "store") as store:
        reader = FieldReader(tmp_path, tmp_path)
        worker = Worker(store.blobs, NpzDirectory(tmp_path), reader, events.append)
        worker.start()
        for name in ("battery", "gone", "undeclared"):
            worker.submit(ReadField("a" * 32, name))
        worker.stop(30.0)
    assert events[0] == FieldRead("a" * 32, 21.5)
    codes = [event.fault.code for event in events if isinstance(event, WorkFailed)]
    assert codes == ["field-unreadable", "field-unreadable"]


# --- the device's core


def fleet(values: list[float]) -> list[FakeDevice]:
    devices = [FakeDevice(f"device-{i}") for i in range(len(values))]
    for device, value in zip(devices, values, strict=True):
        device.declare(battery=value)
    return devices


def test_a_query_gives_the_mean_of_the_clipped_values_and_enters_the_ledger() -> None:
    devices = fleet([10.0, 20.0, 500.0, -3.0])
    aggregator = Aggregator(devices, query_plan())
    aggregator.run()
    mean, metrics = aggregator.mean()
    assert metrics == {}
    # Stochastic rounding moves each value by less than one step of the ring, of 40 / radius.
    assert 40.0 + 40.0 * mean[0] == pytest.approx((10 + 20 + 80 + 0) / 4, abs=40 / aggregator.encoding.radius)
    for device in devices:
        (item,) = device.disk.ledger
        assert isinstance(item.entry.task, QueryTask) and item.entry.task.field == "battery"
        assert "trained" not in device.note_events()


def test_a_histogram_is_exact() -> None:
    devices = fleet([10.0, 20.0, 500.0, -3.0])
    aggregator = Aggregator(devices, query_plan(question=HistogramQuestion(bins=4)))
    aggregator.run()
    np.testing.assert_allclose(4 * aggregator.mean()[0], [2, 1, 0, 1], atol=1e-6)


def test_a_kill_in_every_phase_changes_nothing() -> None:
    devices = fleet([10.0, 20.0, 30.0, 40.0])
    aggregator = Aggregator(devices, query_plan())

    def kill(device: FakeDevice) -> None:
        device.reboot()
        device.declare()
        device.work(1)
        device.reboot()
        device.declare()

    aggregator.run(kill)
    mean, _ = aggregator.mean()
    assert 40.0 + 40.0 * mean[0] == pytest.approx(25.0, abs=1e-3)


def test_no_note_and_no_message_shows_the_value() -> None:
    devices = fleet([12.34375, 20.0, 30.0])
    aggregator = Aggregator(devices, query_plan())
    aggregator.run()
    shown = repr(devices[0].notes) + repr(devices[0].state) + repr(aggregator.received)
    assert "12.34" not in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_the_round_with_a_code(value: float) -> None:
    devices = fleet([10.0, 20.0, 30.0, value])
    aggregator = Aggregator(devices, query_plan())
    aggregator.step()
    aggregator.ask()
    devices[-1].work()
    sent = devices[-1].take()
    assert [message.code for message in sent if isinstance(message, ClientAbort)] == ["value-not-finite"]
    assert devices[-1].state.active is None
    assert not devices[-1].disk.ledger


def test_a_device_without_the_field_refuses_and_one_without_data_answers() -> None:
    device = FakeDevice()
    device.receive(invitation(query_plan()))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == "unknown-field"
    device.declare(battery=3.0)
    device.give(ConditionsChanged(Fault("no-data", "there is nothing to train on")))
    device.receive(invitation(query_plan()))
    (answer,) = device.take()
    assert isinstance(answer, AdvertiseKeys)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (DevicePolicy(), "cohort-too-small"),
        (
            PERMISSIVE.model_copy(update={"privacy_modes": frozenset({PrivacyMode.DISTRIBUTED})}),
            "privacy-mode",
        ),
    ],
)
def test_the_gates_of_training_hold_for_queries(policy: DevicePolicy, code: str) -> None:
    device = FakeDevice(policy=policy)
    device.declare(battery=3.0)
    device.receive(invitation(query_plan()))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == code


def test_queries_and_training_share_one_epsilon() -> None:
    noisy = NO_NOISE.model_copy(update={"mode": PrivacyMode.DISTRIBUTED, "noise_multiplier": 1.0})
    devices = [
        FakeDevice(f"device-{i}", PERMISSIVE.model_copy(update={"maximum_epsilon": 6.0})) for i in range(3)
    ]
    for device in devices:
        device.declare(battery=1.0)
    aggregator = Aggregator(devices, query_plan().model_copy(update={"privacy": noisy}))
    aggregator.run()
    again = query_plan().model_copy(update={"privacy": noisy, "round_id": "b" * 32})
    aggregator.end()
    devices[0].take()
    devices[0].receive(invitation(again))
    (refusal,) = devices[0].take()
    assert isinstance(refusal, Refusal) and refusal.code == "epsilon-exceeded"


def test_a_reading_is_no_answer_to_training() -> None:
    device = FakeDevice()
    device.install()
    aggregator = Aggregator([device, FakeDevice("device-1"), FakeDevice("device-2")], plan())
    for other in aggregator.devices[1:]:
        other.install()
    aggregator.step()
    aggregator.ask()
    device.give(FieldRead("a" * 32, 3.0))
    assert device.state.active is not None and device.state.active.work == WorkingNow()
