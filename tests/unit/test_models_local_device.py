"""A real model with a local head on a device: trained by the worker, kept in the store, used by `predict`."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

import json
import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.files import Lock
from edge_client.adapters.model_check import check_in_child
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.adapters.worker import Worker
from edge_client.cli import EXIT_RUNNING
from edge_client.commands.state_lock import LOCK
from edge_client.durable import SaveLocal, SaveVersion, StoreChunk, VersionStatus
from edge_client.events import Event, TrainingFinished
from edge_client.main import main
from edge_client.outputs import Train
from edge_client.training import Examples, ModelRejected, TrainingConfig
from models.architectures import ARCHITECTURES
from models.export import ExportedModel
from models.manifest import ModelManifest, describe
from models.weights import encode_weights
from protocol.identity import SignedDocument
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from tests.edge_broker import Fleet
from tests.edge_fleet import OPERATOR, PERMISSIVE
from tests.model_mutants import damaged

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def swings() -> Examples:
    """Stretches of windows whose swing tells their class."""
    random = np.random.default_rng(5)
    y = np.repeat(np.tile(np.arange(7), 2), 15).astype(np.int32)
    phase = random.uniform(0, 2 * np.pi, (len(y), 1))
    wave = np.sin(2 * np.pi * (0.5 + y[:, None]) * np.arange(100) / 50 + phase)
    return Examples("device", (wave[:, :, None] * np.ones(6)).astype(np.float32), y)


def own_head() -> ExportedModel:
    architecture = replace(ARCHITECTURES["watch"], local_layers=("exercise",), example_gradients=False)
    return architecture.export()


def test_three_hundred_damaged_graphs_with_local_parameters_crash_at_most_their_child(tmp_path: Path) -> None:
    own_head().write(tmp_path)
    found = damaged(tmp_path, 300)
    assert found["rejected"] > 240
    assert sum(count for how, count in found.items() if how.startswith("SIG")) < 15


def test_a_manifest_that_moves_parameters_between_its_vectors_is_refused() -> None:
    """Each is well formed, and is of the very graph: only that tells that its vectors have other lengths."""
    made = own_head()
    parts = made.manifest.whole_layout
    for shared in range(1, len(parts)):
        count = parts[shared].offset
        local = tuple(part.model_copy(update={"offset": part.offset - count}) for part in parts[shared:])
        weights = encode_weights(np.zeros(count, np.float32))
        manifest = ModelManifest.model_validate(
            dict(made.manifest)
            | {"weights": describe(weights), "parameter_count": count}
            | {"parameters": parts[:shared], "local_parameters": local}
        )
        if count == made.manifest.parameter_count:
            check_in_child(manifest, made.graph, weights)
            continue
        with pytest.raises(ModelRejected):
            check_in_child(manifest, made.graph, weights)


def test_a_round_moves_what_predict_answers_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = own_head()
    manifest = exported.manifest
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    data = tmp_path / "data"
    data.mkdir()
    swings().save(data / "some.npz")
    check_in_child(manifest, exported.graph, encode_weights(exported.weights))

    with DeviceStore.open(state) as store:
        files = ((manifest.graph, exported.graph), (manifest.weights, encode_weights(exported.weights)))
        for blob, content in files:
            for chunk, body in chunks(blob, content, range(10)):
                store.apply([StoreChunk(blob, chunk.index, body)])
            assert store.blobs.find(blob).complete
        document = SignedDocument.create(OPERATOR, MODEL_KIND, manifest.to_bytes())
        store.apply([SaveVersion(document, manifest, VersionStatus.GOOD)])

    def predicted() -> tuple[bool, np.ndarray]:
        np.save(tmp_path / "x.npy", swings().x[::10])
        capsys.readouterr()
        assert main(["predict", "--state", str(state), "--input", str(tmp_path / "x.npy"), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        rows = [list(item["probabilities"].values()) for item in answer["predictions"]]
        return answer["personal"], np.array(rows)

    trainer = TfliteTrainer(manifest, exported.graph)
    _, start = predicted()
    np.testing.assert_allclose(start, trainer.predict(exported.weights, swings().x[::10]), atol=1e-5)

    results: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with DeviceStore.open(state) as store:
        worker = Worker(store.blobs, NpzDirectory(data), FieldReader(state, data), results.put)
        worker.start()
        try:
            worker.submit(Train("a" * 32, manifest, TrainingConfig(5, 0.1)))
            finished = results.get(timeout=120)
            assert isinstance(finished, TrainingFinished) and finished.update.local is not None
            assert finished.update.delta.shape == (manifest.parameter_count,)
        finally:
            worker.stop(60.0)
        own = store.blobs.write_local(encode_weights(finished.update.local))
        # Written, but not committed: as after a kill.
        assert np.array_equal(predicted()[1], start)
        store.apply([SaveLocal(manifest.name, manifest.local_layout, own)])
    personal, after = predicted()
    wanted = trainer.predict(exported.weights, swings().x[::10], finished.update.local)
    assert not personal and np.abs(after - start).max() > 0.05
    np.testing.assert_allclose(after, wanted, atol=1e-5)

    assert main(["personalise", "--state", str(state), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]
    kept = (state / "personal" / "watch").read_bytes().partition(b"\n")[2]
    assert len(kept) == 4 * (manifest.parameter_count + manifest.local_count)
    personal, tuned = predicted()
    assert personal
    truth = swings().y[::10]
    assert (tuned.argmax(axis=1) == truth).mean() >= (after.argmax(axis=1) == truth).mean()

    # Another owner: what the device learnt for the last one goes, once no client could write it anew.
    assert main(["reset", "--state", str(state), "--personal"]) == 0
    running = Lock(state / LOCK)
    assert running.acquire()
    assert main(["reset", "--state", str(state), "--local"]) == EXIT_RUNNING
    assert "stop it first" in capsys.readouterr().err
    running.release()
    assert main(["reset", "--state", str(state), "--local", "--model", "digits"]) == 0
    assert "no local parameters" in capsys.readouterr().out
    np.testing.assert_allclose(predicted()[1], after, atol=1e-6)
    assert main(["reset", "--state", str(state), "--local"]) == 0
    assert "dropped the local parameters of watch" in capsys.readouterr().out
    assert np.array_equal(predicted()[1], start)
    assert not any((state / "local").iterdir())
