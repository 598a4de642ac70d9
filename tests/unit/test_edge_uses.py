"""Versions that fail in use: the device goes back by itself, and nobody is blamed for a SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_client import report
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.uses import VersionUses
from edge_client.adapters.worker import tflite_trainer
from edge_client.cli import EXIT_NO_MODEL
from edge_client.durable import SaveVersion, StoreChunk, VersionStatus
from edge_client.events import Fault, Personalised, VersionFailed
from edge_client.local import Predictor, TrainerFactory
from edge_client.outputs import Personalise
from edge_client.personalisation import PersonalConfig
from edge_client.prediction import NoModel
from edge_client.session_state import UNUSABLE
from edge_client.training import LocalTrainer, ModelRejected
from models import zoo
from models.manifest import ModelManifest
from models.weights import encode_weights
from protocol.identity import SignedDocument
from protocol.messages import ClientAbort
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from tests.edge_broker import Fleet
from tests.edge_fleet import OPERATOR, PERMISSIVE, Aggregator, FakeDevice, manifest, plan

WATCH = zoo.load("watch")
CRASHING = """
import ctypes, sys
from edge_client.adapters.tflite import TfliteTrainer
TfliteTrainer.predict = lambda *_: {action}
from edge_client.main import main
sys.exit(main(sys.argv[1:]))
"""


def served(version: int) -> ModelManifest:
    return WATCH.manifest.model_copy(update={"version": version})


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An enrolled device that serves version 2, and has version 1 to fall back on."""
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("barn-1", PERMISSIVE)
    fleet.data("barn-1", WATCH.manifest)
    np.save(tmp_path / "x.npy", np.zeros((100, 6)))
    with DeviceStore.open(state) as store:
        for number in (1, 2):
            model = served(number)
            for blob, data in ((model.graph, WATCH.graph), (model.weights, encode_weights(WATCH.weights))):
                for chunk, body in chunks(blob, data, range(10)):
                    store.apply([StoreChunk(blob, chunk.index, body)])
                assert store.blobs.find(blob).complete
            document = SignedDocument.create(OPERATOR, MODEL_KIND, model.to_bytes())
            store.apply([SaveVersion(document, model, VersionStatus.GOOD)])
    return state


def serving(state: Path) -> list[tuple[int, str, bool]]:
    models = report.status(state, running=False)["models"]
    return sorted((model["version"], model["reason"], model["serving"]) for model in models)


def version_now(state: Path, trainer: TrainerFactory = tflite_trainer) -> int:
    """The version that answers."""
    return Predictor(state, trainer=trainer).predict(np.zeros((100, 6))).version


def run_a_little(state: Path) -> str:
    """Runs the daemon, with nobody to talk to, until it has taken in what failed; returns its log."""
    command = [sys.executable, "-m", "edge_client.main", "run", "--state", str(state)]
    arguments = ["--broker", "mqtt://127.0.0.1:9", "--data", str(state.parent / "barn-1-data")]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if "disconnected" in line:
                break
        process.send_signal(signal.SIGTERM)
        log += process.stderr.read()
        assert process.wait(timeout=120) == 0
    return log


def predict(state: Path, action: str) -> subprocess.CompletedProcess[str]:
    arguments = ["predict", "--state", str(state), "--input", str(state.parent / "x.npy"), "--json"]
    code = CRASHING.format(action=action)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_a_version_that_crashes_a_prediction_gives_way_to_the_one_before(state: Path) -> None:
    done = predict(state, "ctypes.string_at(0)")
    assert done.returncode == -signal.SIGSEGV
    # At once, for who asks again; and for good, once the daemon has taken it in.
    assert version_now(state) == 1
    log = run_a_little(state)
    assert "version-bad" in log and "crashed: Fatal Python error: Segmentation fault" in log
    (one, two) = serving(state)
    assert one == (1, "", True) and two[0] == 2 and two[1].startswith("crashed: ") and not two[2]
    assert list((state / "uses").iterdir()) == []


def test_a_version_that_crashes_and_is_the_only_one_is_not_served(state: Path) -> None:
    for _ in range(2):
        assert predict(state, "ctypes.string_at(0)").returncode == -signal.SIGSEGV
    # Nothing is left to crash: whoever asks is told why, before the daemon knows and after.
    reason = "failed (crashed: Fatal Python error"
    for _ in range(2):
        done = predict(state, "ctypes.string_at(0)")
        assert done.returncode == EXIT_NO_MODEL and reason in done.stderr, done
        log = run_a_little(state)
    assert "version-bad" not in log, "it was taken in twice"
    assert [used for _, _, used in serving(state)] == [False, False]
    text = report.status_text(report.status(state, running=False))
    assert "watch: none is served until a version comes that runs here" in text


def test_a_killed_process_blames_nobody(state: Path) -> None:
    done = predict(state, f"__import__('os').kill(__import__('os').getpid(), {signal.SIGKILL})")
    assert done.returncode == -signal.SIGKILL and len(list((state / "uses").iterdir())) == 2
    assert "version-bad" not in run_a_little(state)
    assert serving(state) == [(1, "", False), (2, "", True)]
    assert list((state / "uses").iterdir()) == []


def test_a_crash_of_the_daemon_itself_is_found_by_the_next_one(state: Path) -> None:
    code = (
        "import ctypes, sys; from pathlib import Path; from edge_client.adapters.uses import VersionUses\n"
        "uses = VersionUses(Path(sys.argv[1]))\n"
        "with uses.armed(), uses.of(sys.argv[2]): ctypes.string_at(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(state), served(2).sha256()], check=False)
    assert "version-bad" in run_a_little(state)
    assert [version for version, _, used in serving(state) if used] == [1]


def test_what_lives_is_not_taken_for_crashed(tmp_path: Path) -> None:
    mine, other = VersionUses(tmp_path), VersionUses(tmp_path)
    with mine.armed(), mine.of("a" * 64):
        (tmp_path / "uses" / f"{os.getpid()}.crash").write_text("Fatal Python error: Aborted")
        assert other.found() == () and (tmp_path / "uses" / str(os.getpid())).exists()
    assert other.found() == () and list((tmp_path / "uses").iterdir()) == []
    (tmp_path / "uses" / f"{'b' * 64}.failed").write_text("{")  # cut off by a full disk
    assert other.found() == () and list((tmp_path / "uses").iterdir()) == []


class Picky:
    """A trainer that some versions do not run in."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def __call__(self, model: ModelManifest, graph: bytes) -> LocalTrainer:
        if model.version in self.bad:
            raise ModelRejected("the runtime cannot load the model")
        return tflite_trainer(model, graph)


def test_predictions_and_fine_tuning_fall_back_and_tell_the_daemon(state: Path) -> None:
    (state.parent / "ordered").mkdir()
    y = np.repeat(np.arange(len(WATCH.manifest.labels), dtype=np.int32), 8)
    x = np.zeros((len(y), *WATCH.manifest.input.shape), np.float32)
    np.savez(state.parent / "ordered" / "one.npz", x=x, y=y)
    data = NpzDirectory(state.parent / "ordered")
    config = PersonalConfig(1, 0.1)
    assert report.personalise(state, data, "watch", config, Picky({2}))["version"] == 1
    assert version_now(state) == 1
    run_a_little(state)
    assert [version for version, _, used in serving(state) if used] == [1]
    assert serving(state)[1][1].startswith(f"{UNUSABLE}: ")
    # Where none runs, it says so: an answer of a version that failed is no answer.
    for _ in range(2):
        with pytest.raises(NoModel, match=r"version 2 failed .*cannot load"):
            version_now(state, Picky({1, 2}))


def test_predictions_come_from_the_version_served_last_after_a_roll_back(state: Path) -> None:
    with DeviceStore.open(state) as store:
        document = SignedDocument.create(OPERATOR, MODEL_KIND, served(1).to_bytes())
        store.apply([SaveVersion(document, served(1), VersionStatus.GOOD)])
    assert version_now(state) == 1


def test_fine_tuning_that_shows_a_version_unusable_is_enough() -> None:
    device = FakeDevice()
    device.install()
    device.install(manifest(2))
    fault = Fault("data-unusable", "too few examples")
    device.give(Personalised("watch", fault, manifest(2).sha256()))
    assert device.state.library.serving() == {"watch": 2}
    device.give(Personalised("watch", Fault(UNUSABLE, "it does not run"), manifest(2).sha256()))
    assert device.state.library.serving() == {"watch": 1} and device.failures["watch"].version == 2
    assert not any(isinstance(job, Personalise) for job in device.jobs)


def test_a_round_about_a_version_that_crashed_the_process_is_left() -> None:
    devices = [FakeDevice(f"device-{i}") for i in range(3)]
    for device in devices:
        device.install()
        device.install(manifest(2))
        device.take()
    aggregator = Aggregator(devices, plan(base=manifest(2)))
    aggregator.ask()
    victim = devices[0]
    assert victim.state.active is not None
    victim.reboot()
    victim.give(VersionFailed(manifest(2).sha256(), Fault("crashed", "Segmentation fault")))
    assert victim.state.active is None and victim.state.library.serving() == {"watch": 1}
    assert any(isinstance(message, ClientAbort) for message in victim.outbox)
