"""The worker tries a new version in a child first; one that fails there is never loaded by the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.durable import StoreChunk
from edge_client.events import Event, VersionTested
from edge_client.outputs import TestVersion
from edge_client.training import ModelRejected
from models import zoo
from models.weights import encode_weights
from protocol.transfer import chunks
from tests.edge_broker import Fleet
from tests.edge_fleet import PERMISSIVE

WATCH = zoo.load("watch")


def test_a_version_that_crashes_the_child_is_bad_and_never_loaded(tmp_path: Path) -> None:
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    events: list[Event] = []
    loaded: list[str] = []

    def crash(manifest: Any, graph: bytes, weights: bytes) -> None:
        assert (graph, len(weights)) == (WATCH.graph, WATCH.manifest.weights.size)
        raise ModelRejected("trying the model ended its process: SIGSEGV")

    def load(manifest: Any, graph: bytes) -> Any:
        loaded.append(manifest.name)

    files = {WATCH.manifest.graph: WATCH.graph, WATCH.manifest.weights: encode_weights(WATCH.weights.copy())}
    with DeviceStore.open(state) as store:
        for blob, data in files.items():
            for chunk, body in chunks(blob, data, range(10)):
                store.apply([StoreChunk(blob, chunk.index, body)])
            assert store.blobs.find(blob).complete
        examples, fields = NpzDirectory(tmp_path), FieldReader(tmp_path, tmp_path)
        worker = Worker(store.blobs, examples, fields, events.append, trainer=load, check=crash)
        worker.start()
        worker.submit(TestVersion("d" * 64, WATCH.manifest))
        worker.stop(30.0)
    (event,) = events
    assert isinstance(event, VersionTested) and event.fault is not None
    assert (event.fault.code, event.fault.transient) == ("model-unusable", False)
    assert "SIGSEGV" in event.fault.detail
    assert not loaded
