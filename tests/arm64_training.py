"""Train a bundled model as a device does in a round: the worker's thread, its blobs, and NPZ files.

    python tests/arm64_training.py MODEL DATA OUT     writes the update's delta to OUT (.npy)

Run on this machine's processor and on an emulated one, to compare what they learned.
"""

from __future__ import annotations

import hashlib
import platform
import queue
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.blobs import Blobs
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.worker import Worker
from edge_client.events import Event, TrainingFinished
from edge_client.outputs import Train
from edge_client.training import TrainingConfig
from models import zoo
from models.weights import encode_weights

STEPS = 10
CONFIG = TrainingConfig(local_epochs=1, learning_rate=0.1, seed=3)


def trained(model: str, data: Path) -> NDArray[np.float32]:
    """The delta of one job of the worker."""
    bundled = zoo.load(model)
    manifest = bundled.manifest
    results: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(Path(folder))
        blobs.prepare()
        for content in (bundled.graph, encode_weights(bundled.weights)):
            (Path(folder) / "blobs" / hashlib.sha256(content).hexdigest()).write_bytes(content)
        worker = Worker(blobs, NpzDirectory(data), FieldReader(Path(folder), data), results.put)
        worker.start()
        try:
            worker.submit(Train("00" * 16, manifest, CONFIG))
            event = results.get(timeout=180)
        finally:
            worker.stop(60.0)
    if not isinstance(event, TrainingFinished):
        raise SystemExit(f"no update: {event}")
    return event.update.delta


if __name__ == "__main__":
    np.save(sys.argv[3], trained(sys.argv[1], Path(sys.argv[2])))
    print(platform.machine())
