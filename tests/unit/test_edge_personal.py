"""Fine-tuning on the device: judged on later examples, kept only if better, and never in the way."""

from __future__ import annotations

import json
import queue
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.files import StorageFull
from edge_client.adapters.personal import PersonalFiles
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.events import ConditionsChanged, Event, Fault, Personalised
from edge_client.main import main
from edge_client.outputs import Personalise
from edge_client.personalisation import (
    MINIMUM_HELD_OUT,
    Personal,
    PersonalConfig,
    PersonalRecord,
    better,
    split_in_time,
)
from edge_client.training import Evaluation, Examples, ExamplesRejected
from models import zoo
from models.datasets import watch as recordings
from tests.edge_broker import Fleet
from tests.edge_fleet import PERMISSIVE, Aggregator, FakeDevice, manifest, plan
from tests.unit.test_edge_cli import install_watch

WATCH = zoo.load("watch")
COUNT = WATCH.manifest.parameter_count


def run(*arguments: object) -> int:
    return int(main([str(argument) for argument in arguments]))


def person(*, drift: int = 0) -> Examples:
    """Two stretches for each class, told by their swing; in their last third it is another class's."""
    random = np.random.default_rng(5)
    y = np.repeat(np.tile(np.arange(7), 2), 15).astype(np.int32)
    late = np.tile(np.arange(15) >= 9, 14)
    swing = np.where(late, (y + drift) % 7, y)
    time = np.arange(100) / 50
    phase = random.uniform(0, 2 * np.pi, (len(y), 1))
    wave = np.sin(2 * np.pi * (0.5 + swing[:, None]) * time + phase)
    x = wave[:, :, None] * np.array([1.0, 0.5, 0.5, 1.0, 2.5, 1.0])
    return Examples("device", x.astype(np.float32), y)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    install_watch(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    person().save(directory / "some.npz")
    return directory


# --- the split -------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    held_out=st.floats(0.1, 0.6),
    gap=st.integers(0, 5),
)
def test_the_sides_are_apart_in_time_and_every_stretch_is_cut(
    lengths: list[int], held_out: float, gap: int
) -> None:
    y = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(np.int32)
    places = np.arange(len(y), dtype=np.float32)[:, None]
    try:
        earlier, later = split_in_time(Examples("device", places, y), held_out, gap)
    except ExamplesRejected:
        return
    trains, judges = earlier.x[:, 0].astype(int), later.x[:, 0].astype(int)
    distances = np.abs(trains[:, None] - judges[None, :])
    assert distances.min() > gap
    start = 0
    for length in lengths:
        inside = judges[(judges >= start) & (judges < start + length)]
        assert inside.tolist() == list(range(start + length - int(held_out * length), start + length))
        start += length
    # Nothing is left out without need.
    for place in set(range(len(y))) - set(trains) - set(judges):
        assert np.abs(judges - place).min() <= gap


def test_values_are_cut_once() -> None:
    values = np.linspace(0, 1, 100, dtype=np.float32)[:, None]
    earlier, later = split_in_time(Examples("device", values, values), 0.3, 2)
    assert len(later) == 30 and len(earlier) == 68
    assert earlier.y.max() < later.y.min()


@pytest.mark.skipif(find_spec("seglearn") is None, reason="seglearn is absent")
def test_no_sample_of_a_real_recording_is_on_both_sides() -> None:
    for examples in recordings.load()[:3]:
        earlier, later = split_in_time(examples, 0.3, 1)
        sides = [
            {row.tobytes() for window in side.x for row in window if np.abs(row).sum() > 0}
            for side in (earlier, later)
        ]
        assert sides[0].isdisjoint(sides[1])
        assert set(earlier.y) == set(later.y) == set(range(7))
        # Without the gap they have half a window in common: the test sees an overlap where there is one.
        touching = [
            {row.tobytes() for window in side.x for row in window} for side in split_in_time(examples, 0.3, 0)
        ]
        assert not touching[0].isdisjoint(touching[1])


def test_examples_that_are_shuffled_or_few_are_refused() -> None:
    random = np.random.default_rng(0)
    y = random.permutation(np.repeat(np.arange(7), 30)).astype(np.int32)
    with pytest.raises(ExamplesRejected, match="order of time"):
        split_in_time(Examples("device", np.zeros((210, 1), np.float32), y), 0.3, 1)
    few = np.zeros(MINIMUM_HELD_OUT, np.int32)
    with pytest.raises(ExamplesRejected, match="too few"):
        split_in_time(Examples("device", np.zeros((len(few), 1), np.float32), few), 0.3, 1)


def test_better_is_more_accurate_or_as_accurate_with_less_loss() -> None:
    def scored(accuracy: float, loss: float) -> Evaluation:
        return Evaluation(loss, accuracy, np.zeros((0, 0), np.int64), 10)

    assert better(scored(0.9, 2.0), scored(0.8, 1.0))
    assert better(scored(0.8, 0.9), scored(0.8, 1.0))
    assert not better(scored(0.8, 1.0), scored(0.8, 1.0))
    assert not better(scored(0.7, 0.1), scored(0.8, 1.0))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"gap": -1}, {"held_out": 1.0}])
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        PersonalConfig(**wrong)  # type: ignore[arg-type]


# --- files -----------------------------------------------------------------------------------------------


def record(*, kept: bool = True, version: str | None = None) -> PersonalRecord:
    return PersonalRecord(
        model="watch",
        version=1,
        manifest_sha256=version or WATCH.manifest.sha256(),
        epochs=1,
        trained_on=20,
        held_out=10,
        global_accuracy=0.5,
        global_loss=1.0,
        personal_accuracy=0.75,
        personal_loss=0.5,
        kept=kept,
    )


def test_a_file_comes_back_for_its_own_version_only(tmp_path: Path) -> None:
    files = PersonalFiles(tmp_path / "personal")
    weights = np.arange(COUNT, dtype=np.float32)
    with files.writing():
        files.save(Personal(record(), weights))
    found = files.load(WATCH.manifest)
    assert found is not None and found.record == record() and found.weights is not None
    assert np.array_equal(found.weights, weights)
    assert files.records() == (record(),)
    other = WATCH.manifest.model_copy(update={"version": 2})
    assert files.load(other) is None
    with files.writing():
        files.save(Personal(record(kept=False)))
    found = files.load(WATCH.manifest)
    assert found is not None and found.weights is None
    assert files.drop("digits") == () and files.drop() == ("watch",) and files.load(WATCH.manifest) is None


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    files = PersonalFiles(tmp_path / "personal")
    with files.writing():
        files.save(Personal(record(), np.ones(COUNT, np.float32)))
    path = tmp_path / "personal" / "watch"
    whole = path.read_bytes()
    for at in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert files.load(WATCH.manifest) is None, at
    for length in (0, 10, len(whole) - 4):
        path.write_bytes(whole[:length])
        assert files.load(WATCH.manifest) is None, length
    path.write_bytes(whole)
    assert files.load(WATCH.manifest) is not None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PersonalFiles(tmp_path / "personal")
    with files.writing():
        files.save(Personal(record(), np.ones(COUNT, np.float32)))
        monkeypatch.setattr("os.fsync", _no_space)
        with pytest.raises(StorageFull):
            files.save(Personal(record(), np.zeros(COUNT, np.float32)))
    found = files.load(WATCH.manifest)
    assert found is not None and found.weights is not None and found.weights.sum() == COUNT


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


# --- commands --------------------------------------------------------------------------------------------


def answered(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[bool, list[str]]:
    np.save(tmp_path / "x.npy", person().x[::5])
    capsys.readouterr()
    assert run("predict", "--state", state, "--input", tmp_path / "x.npy", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    return answer["personal"], [item["label"] for item in answer["predictions"]]


def test_predictions_are_personal_until_reset_or_a_new_version(
    state: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = [WATCH.manifest.labels[label] for label in person().y[::5]]
    personal, before = answered(state, tmp_path, capsys)
    assert not personal
    assert run("personalise", "--state", state, "--data", data, "--epochs", 30, "--learning-rate", 0.1) == 0
    assert "kept" in capsys.readouterr().out
    personal, after = answered(state, tmp_path, capsys)
    assert personal
    assert np.mean([a == b for a, b in zip(after, truth, strict=True)]) > 0.6
    assert run("status", "--state", state) == 0 and "personal       watch v1: kept" in capsys.readouterr().out
    # A damaged file costs the personal model, not the answer.
    path = state / "personal" / "watch"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert answered(state, tmp_path, capsys) == (False, before)
    path.write_bytes(whole)
    install_watch(state, 2)
    assert answered(state, tmp_path, capsys) == (False, before)
    assert run("personalise", "--state", state, "--data", data, "--epochs", 30, "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert answered(state, tmp_path, capsys)[0]
    assert run("reset", "--state", state, "--personal") == 0
    assert "dropped the personal watch" in capsys.readouterr().out
    assert answered(state, tmp_path, capsys) == (False, before)
    assert run("reset", "--state", state, "--personal") == 0
    assert "no personal model" in capsys.readouterr().out


def test_one_that_is_not_better_is_not_kept(
    state: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person(drift=3).save(data / "some.npz")
    before = answered(state, tmp_path, capsys)
    assert run("personalise", "--state", state, "--data", data, "--epochs", 60, "--learning-rate", 0.2) == 0
    assert "not kept" in capsys.readouterr().out
    assert answered(state, tmp_path, capsys) == before
    assert run("status", "--state", state) == 0 and "not better" in capsys.readouterr().out


def test_what_cannot_be_done_says_why(
    state: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(expected: str, *options: object, directory: Path = data) -> None:
        assert run("personalise", "--state", state, "--data", directory, *options) == 1
        assert expected in capsys.readouterr().err

    fails("epochs", "--epochs", 0)
    fails("not there", directory=tmp_path / "nowhere")
    fails("became", "--learning-rate", 1e6)
    with PersonalFiles(state / "personal").writing():
        fails("another process personalises")
    Examples("device", np.zeros((4, 3), np.float32), np.zeros(4, np.int32)).save(data / "some.npz")
    fails("shape")
    assert not (state / "personal" / "watch").exists()


# --- the daemon ------------------------------------------------------------------------------------------


def personal_jobs(device: FakeDevice) -> list[int]:
    """Versions that the device is to fine-tune; they are done at once."""
    versions = [job.manifest.version for job in device.jobs if isinstance(job, Personalise)]
    device.work()
    return versions


WILLING = PERMISSIVE.model_copy(update={"personal_epochs": 3, "personal_learning_rate": 0.2})


def test_every_new_version_is_personalised_once_if_the_owner_wants() -> None:
    device, unwilling = FakeDevice(policy=WILLING), FakeDevice("device-1")
    device.tick()
    assert personal_jobs(device) == []
    for item in (device, unwilling):
        item.install(manifest(1))
        item.tick()
    (job,) = device.jobs
    assert isinstance(job, Personalise)
    assert (job.config.epochs, job.config.learning_rate, job.local) == (3, 0.2, None)
    assert personal_jobs(device) == [1] and personal_jobs(unwilling) == []
    assert "not-personalised" in device.note_events()
    device.tick()
    assert personal_jobs(device) == []
    device.install(manifest(2))
    device.tick()
    assert personal_jobs(device) == [2]


def test_rounds_come_first() -> None:
    devices = [FakeDevice(f"device-{i}", WILLING) for i in range(3)]
    for device in devices:
        device.install()
        device.take()
    aggregator = Aggregator(devices, plan())
    aggregator.ask()
    for device in devices:
        device.tick()
        assert device.state.active is not None and personal_jobs(device) == []
    aggregator.run()
    aggregator.end()
    for device in devices:
        device.tick()
        assert personal_jobs(device) == [1]


def test_a_device_without_data_does_not_try() -> None:
    device = FakeDevice(policy=WILLING)
    device.install()
    device.give(ConditionsChanged(Fault("no-data", "nothing there")))
    device.tick()
    assert personal_jobs(device) == []
    device.give(ConditionsChanged(None))
    device.tick()
    assert personal_jobs(device) == [1]


def test_the_worker_does_what_the_command_does(state: Path, data: Path, tmp_path: Path) -> None:
    results: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with DeviceStore.open(state) as store:
        assert store.load().personalised == frozenset()
        worker = Worker(store.blobs, NpzDirectory(data), FieldReader(state, data), results.put)
        worker.start()
        try:
            worker.submit(Personalise(WATCH.manifest, PersonalConfig(30, 0.1)))
            event = results.get(timeout=120)
            assert isinstance(event, Personalised) and isinstance(event.result, PersonalRecord)
            assert event.result.kept and event.result.personal_accuracy > 0.6
            assert store.load().personalised == {WATCH.manifest.sha256()}
            kept = store.blobs.personal.load(WATCH.manifest)
            assert kept is not None and kept.record == event.result
            # A failure is an event, too, and leaves what there is.
            with store.blobs.personal.writing():
                worker.submit(Personalise(WATCH.manifest, PersonalConfig(1, 0.1)))
                event = results.get(timeout=120)
            assert isinstance(event, Personalised) and isinstance(event.result, Fault)
            assert event.result.code == "storage" and store.blobs.personal.load(WATCH.manifest) is not None
        finally:
            worker.stop(60.0)
