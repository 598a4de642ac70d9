"""The command line: help, exit codes, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edge_client
from edge_client import report
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker, fault_of
from edge_client.cli import byte_rate
from edge_client.commands.running import runtime_name
from edge_client.durable import SaveVersion, StoreChunk, VersionStatus
from edge_client.events import Event, TrainingFinished, VersionTested, WorkFailed
from edge_client.main import main
from edge_client.outputs import TestVersion, Train
from edge_client.prediction import prediction_of
from edge_client.training import TrainingConfig
from models import zoo
from models.examples import InvalidExamples
from models.manifest import TargetSpec
from models.weights import encode_weights
from protocol.identity import SignedDocument
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from tests.edge_broker import Fleet, command
from tests.edge_fleet import OPERATOR, PERMISSIVE, manifest

WATCH = zoo.load("watch")


def run(*arguments: object) -> int:
    return int(main([str(argument) for argument in arguments]))


def daemon(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`covey-edge run` in a process of its own: it keeps signals and priority of the one it is in."""
    return subprocess.run(
        command("run", *arguments), capture_output=True, text=True, check=False, timeout=120
    )


def install_watch(state: Path, version: int = 1) -> None:
    """Puts the bundled watch model into a device's store, as `run` would."""
    model = WATCH.manifest.model_copy(update={"version": version})
    document = SignedDocument.create(OPERATOR, MODEL_KIND, model.to_bytes())
    with DeviceStore.open(state) as store:
        for blob, data in ((model.graph, WATCH.graph), (model.weights, encode_weights(WATCH.weights.copy()))):
            for chunk, body in chunks(blob, data, range(10)):
                store.apply([StoreChunk(blob, chunk.index, body)])
            assert store.blobs.find(blob).complete
        store.apply([SaveVersion(document, model, VersionStatus.GOOD)])


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], *([name, "--help"] for name in ("init", "enroll", "run", "status"))):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "covey-edge" in capsys.readouterr().out.split("example", 1)[-1]
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_a_download_rate_is_bytes_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    assert [byte_rate(text) for text in ("65536", "200k", "1.5M")] == [65_536, 2e5, 1.5e6]
    for text in ("0", "-1", "fast", "", "k", "nan", "inf", "1e400"):
        with pytest.raises(SystemExit) as stop:
            run("run", "--state", "s", "--broker", "b", "--data", "d", f"--max-download-rate={text}")
        assert stop.value.code == 2 and "such as 200k" in capsys.readouterr().err


def test_the_way_from_nothing_to_enrolled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, fleet = tmp_path / "state", Fleet(tmp_path)
    for asked in ("status", "privacy", "predict"):
        extra = ["--input", tmp_path / "x.npy"] if asked == "predict" else []
        np.save(tmp_path / "x.npy", np.zeros(3))
        assert run(asked, "--state", state, *extra) == 3
        assert "covey-edge enroll" in capsys.readouterr().err
    assert run("init", "--state", state, "--device-id", "Barn") == 3
    assert run("init", "--state", state, "--device-id", "barn-1") == 0
    assert run("init", "--state", state, "--device-id", "barn-1") == 0
    capsys.readouterr()
    started = daemon("--state", state, "--broker", "mqtt://127.0.0.1", "--data", tmp_path)
    assert started.returncode == 3 and "covey-edge enroll" in started.stderr
    bundle = tmp_path / "bundle.json"
    assert run("enroll", "--state", state, "--bundle", bundle) == 1
    bundle.write_text("{}")
    assert run("enroll", "--state", state, "--bundle", bundle) == 1
    bundle.write_bytes(fleet.bundle((state / "device.csr").read_bytes(), "barn-1").to_bytes())
    for _ in range(2):
        assert run("enroll", "--state", state, "--bundle", bundle) == 0
    capsys.readouterr()
    assert run("status", "--state", state, "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["device_id"], status["fleet"], status["running"]) == ("barn-1", "barn", False)
    assert run("status", "--state", state) == 0 and run("privacy", "--state", state) == 0
    assert "has contributed nothing yet" in capsys.readouterr().out
    assert run("predict", "--state", state, "--input", tmp_path / "x.npy") == 5
    started = daemon("--state", state, "--broker", "mqtt://hub.example", "--data", tmp_path)
    assert started.returncode == 1 and "--insecure" in started.stderr


def test_predictions_come_from_the_last_good_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    install_watch(state)
    install_watch(state, 2)
    np.save(tmp_path / "one.npy", np.zeros((100, 6)))
    np.save(tmp_path / "many.npy", np.ones((3, 100, 6), np.int16))
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3)))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    for name, count in (("one", 1), ("many", 3)):
        assert run("predict", "--state", state, "--input", tmp_path / f"{name}.npy", "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["version"] == 2 and len(answer["predictions"]) == count
        first = answer["predictions"][0]
        assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert run("predict", "--state", state, "--input", tmp_path / "one.npy", "--model", "watch") == 0
    assert "watch v2" in capsys.readouterr().out
    for name in ("wrong", "words", "missing"):
        assert run("predict", "--state", state, "--input", tmp_path / f"{name}.npy") == 1
    assert run("predict", "--state", state, "--input", tmp_path / "one.npy", "--model", "digits") == 5


def test_the_policy_is_shown_and_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    assert run("policy", "--state", state) == 0
    assert json.loads(capsys.readouterr().out)["minimum_cohort"] == 5
    (tmp_path / "strict.json").write_text('{"minimum_cohort": 50}')
    assert run("policy", "--state", state, "--file", tmp_path / "strict.json") == 0
    assert run("policy", "--state", state) == 0
    assert '"minimum_cohort": 50' in capsys.readouterr().out
    (tmp_path / "strict.json").write_text('{"minimum_cohort": 1}')
    assert run("policy", "--state", state, "--file", tmp_path / "strict.json") == 1
    assert "minimum_cohort" in capsys.readouterr().err


def test_a_device_never_imports_what_it_must_not() -> None:
    code = (
        "import sys, edge_client.main, edge_client.daemon, edge_client.report, edge_client.adapters.tflite;"
        "import edge_client.commands as c, importlib, pkgutil;"
        "[importlib.import_module(f'{c.__name__}.{m.name}') for m in pkgutil.iter_modules(c.__path__)];"
        "banned = {'tensorflow', 'aggregator', 'deploy', 'dp_accounting', 'scipy', 'rich', 'typer'};"
        "print(sorted(banned & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_of_values_has_no_label_to_give() -> None:
    row = np.array([21.5, 0.25], np.float32)
    known = manifest()
    values = known.model_copy(update={"loss": "huber", "labels": ("degrees", "humidity")})
    found = [prediction_of(values, row)]
    answer = {"model": "m", "version": 3, "personal": False, "predictions": found}
    assert answer["predictions"] == [{"values": {"degrees": 21.5, "humidity": 0.25}}]
    assert report.prediction_text(answer).splitlines()[-1].split() == ["0", "21.500", "0.250"]
    several = known.model_copy(
        update={"labels": ("a", "b"), "target": TargetSpec(shape=(2,), dtype="float32")}
    )
    assert prediction_of(several, row) == {"probabilities": {"a": 21.5, "b": 0.25}}


def test_versions_are_those_of_the_installed_packages() -> None:
    assert edge_client.__version__ == version("covey")
    assert runtime_name() in {f"{name} {_installed(name)}" for name in ("tflite-runtime", "ai-edge-litert")}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# --- data and worker ---------------------------------------------------------------------------------------


def test_values_to_predict_are_not_taken_for_labels(tmp_path: Path) -> None:
    y = np.array([[21.5, 40.0], [19.0, 55.0]], np.float32)
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32), y=y)
    np.testing.assert_array_equal(NpzDirectory(tmp_path).load(manifest()).y, y)


def test_a_data_directory_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    source = NpzDirectory(tmp_path / "data")
    assert (fault := source.fault()) is not None and fault.code == "no-data"
    (tmp_path / "data").mkdir()
    assert (fault := source.fault()) is not None and fault.code == "no-data"
    with pytest.raises(InvalidExamples, match="no examples"):
        source.load(manifest())
    good = {"x": np.zeros((4, 3), np.float32), "y": np.array([0, 1, 0, 1], np.int32)}
    path = tmp_path / "data" / "a.npz"
    bad = [
        good | {"x": np.zeros((4, 2), np.float32)},
        good | {"x": np.zeros((4, 3))},
        good | {"y": np.array([0, 1, 2, 0], np.int32)},
        good | {"y": np.array([0, -1, 0, 0], np.int32)},
        good | {"x": np.full((4, 3), np.nan, np.float32)},
        {"x": good["x"]},
        good | {"x": np.array([object()] * 4)},
    ]
    for arrays in bad:
        np.savez(path, **arrays)
        with pytest.raises(InvalidExamples, match=r"a\.npz"):
            source.load(manifest())
    path.write_bytes(b"PK not a zip file")
    with pytest.raises(InvalidExamples):
        source.load(manifest())
    np.savez(path, **good)
    np.savez(tmp_path / "data" / "b.npz", **good)
    assert source.fault() is None and len(source.load(manifest())) == 8


def test_the_worker_turns_every_failure_into_a_fault(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("barn-1", PERMISSIVE)
    install_watch(state)
    data = fleet.data("barn-1", WATCH.manifest)
    events: list[Event] = []
    with DeviceStore.open(state) as store:
        worker = Worker(store.blobs, NpzDirectory(data), FieldReader(state, data), events.append)
        train = Train("a" * 32, WATCH.manifest, TrainingConfig(1, 0.05))
        diverging = Train("a" * 32, WATCH.manifest, TrainingConfig(3, 1e30))
        missing = Train("a" * 32, manifest(), TrainingConfig(1, 0.05))
        worker.start()
        for job in (TestVersion("d" * 64, WATCH.manifest), train, diverging, missing, train):
            worker.submit(job)
        worker.stop(60.0)
    kinds = [type(event) for event in events]
    assert kinds == [VersionTested, TrainingFinished, WorkFailed, WorkFailed, TrainingFinished]
    assert isinstance(events[0], VersionTested) and events[0].fault is None
    faults = [event.fault for event in events if isinstance(event, WorkFailed)]
    assert [fault.code for fault in faults] == ["non-finite-update", "storage"]
    # What an unexpected error says might hold data: only its type goes out.
    assert fault_of(RuntimeError("x = [1, 2, 3]")).detail == "RuntimeError"


def test_what_the_aggregator_is_told_of_a_failure_holds_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    install_watch(state)
    data = tmp_path / "data"
    data.mkdir()
    x = np.ones((40, *WATCH.manifest.input.shape), np.float32)
    labels = np.arange(40, dtype=np.int32) % len(WATCH.manifest.labels)
    events: list[Event] = []

    def run_job(x: NDArray[np.float32], y: NDArray[np.int32], rate: float) -> None:
        np.savez(data / "grandmother.npz", x=x, y=y)
        with DeviceStore.open(state) as store:
            worker = Worker(store.blobs, NpzDirectory(data), FieldReader(state, data), events.append)
            worker.start()
            worker.submit(Train("a" * 32, WATCH.manifest, TrainingConfig(3, rate)))
            worker.stop(60.0)

    run_job(x, labels + 90, 0.1)
    run_job(x * np.float32(np.nan), labels, 0.1)
    run_job(x, labels, 1e30)
    faults = [event.fault for event in events if isinstance(event, WorkFailed)]
    assert [fault.code for fault in faults] == ["data-unusable", "data-unusable", "non-finite-update"]
    for fault in faults:
        assert "grandmother" not in fault.detail and not any(map(str.isdigit, fault.detail)), fault
    # The owner's log says more.
    assert "grandmother.npz" in caplog.text
