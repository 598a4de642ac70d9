"""Frozen gradients of TensorFlow's, computed by whichever small runtime this Python has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.adapters.tflite import Interpreter
from models import graph_file

FILE = Path(__file__).parents[1] / "vectors" / "gradients-v1.npz"
NAMES = ("convolutions", "separable", "pooling", "normalisation", "recurrence", "words")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_tensorflows_in_this_runtime(name: str) -> None:
    with np.load(FILE, allow_pickle=False) as file:
        case = {key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/")}
    graph = case["graph"].tobytes()
    graph_file.read(graph)
    interpreter = Interpreter(model_content=graph, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.get_signature_runner("set_weights")(weights=case["weights"])
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    train = interpreter.get_signature_runner("train")
    loss = train(x=case["x"], y=case["y"], mask=case["mask"], lr=one, mu=zero)["loss"]
    moved = case["weights"] - interpreter.get_signature_runner("get_weights")()["weights"]
    assert float(loss) == pytest.approx(float(case["loss"]), rel=1e-5)
    error = np.abs(moved - case["gradient"]).max() / np.abs(case["gradient"]).max()
    assert error < 1e-4
