"""Runs in TensorFlow Federated's environment: trains with TFF, or asks it for its privacy parameters.

python tests/parity/tff_engine.py train TASK.npz RESULT.npz
python tests/parity/tff_engine.py parameters CASES.json RESULT.json
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from tensorflow_federated.python.aggregators import distributed_dp

from models.architectures import digits
from tests import smooth_digits

MODELS = {"digits": digits.build, "smooth": smooth_digits.build}


def flat(tensors: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(tensor).ravel() for tensor in tensors])


def shaped(vector: np.ndarray, like: list[Any]) -> list[np.ndarray]:
    sizes = [int(np.prod(tensor.shape)) for tensor in like]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def epochs(x: np.ndarray, y: np.ndarray, batch: int) -> Any:
    """The batches of one client; none spans two epochs, and the last of each may be smaller."""
    each = [tf.data.Dataset.from_tensor_slices(epoch).batch(batch) for epoch in zip(x, y, strict=True)]
    return functools.reduce(lambda before, after: before.concatenate(after), each)


def train(task_file: Path, result_file: Path) -> None:
    """Trains a model on what each client sees in its epochs: x0 (epochs, n, 8, 8, 1), y0, x1..."""
    task = np.load(task_file)
    clients = [
        epochs(task[f"x{client}"], task[f"y{client}"], int(task["batch"]))
        for client in range(task["clients"])
    ]
    build = MODELS[str(task["model"])]

    def model_fn() -> Any:
        return tff.learning.models.from_keras_model(
            build(),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            input_spec=clients[0].element_spec,
        )

    servers = {
        "fedavg": tff.learning.optimizers.build_sgdm(1.0),
        "fedadam": tff.learning.optimizers.build_adam(
            float(task["server_rate"]), beta_1=0.9, beta_2=0.99, epsilon=1e-3
        ),
    }
    results = {}
    for name, server in servers.items():
        process = tff.learning.algorithms.build_unweighted_fed_avg(
            model_fn,
            client_optimizer_fn=tff.learning.optimizers.build_sgdm(float(task["rate"])),
            server_optimizer_fn=server,
        )
        state = process.initialize()
        weights = process.get_model_weights(state)
        start = shaped(task["weights"], weights.trainable)
        state = process.set_model_weights(state, tff.learning.models.ModelWeights(start, []))
        path = []
        for _ in range(int(task["rounds"])):
            state = process.next(state, clients).state
            path.append(flat(process.get_model_weights(state).trainable))
        results[name] = np.stack(path)
    np.savez(result_file, **results)


def parameters(cases_file: Path, result_file: Path) -> None:
    """What `DistributedDpSumFactory`, the heart of `ddp_secure_aggregator`, derives for each case."""
    rows = []
    for case in json.loads(cases_file.read_text()):
        seen: dict[str, float] = {}
        scale_of, bound_of = (
            distributed_dp._heuristic_scale_factor,
            (distributed_dp.discretization.inflated_l2_norm_bound),
        )

        def scale_spy(local: Any, *rest: Any, _f: Any = scale_of, _seen: Any = seen) -> Any:
            _seen["scale"] = float(found := _f(local, *rest))
            _seen["local_stddev"] = float(found) * float(local)
            return found

        def bound_spy(*, _f: Any = bound_of, _seen: Any = seen, **figures: Any) -> Any:
            found = _f(**figures)
            _seen["scaled_l2"] = (float(found) + 1e-5) * _seen["scale"]
            return found

        distributed_dp._heuristic_scale_factor = scale_spy
        distributed_dp.discretization.inflated_l2_norm_bound = bound_spy
        factory = distributed_dp.DistributedDpSumFactory(
            noise_multiplier=case["noise_multiplier"],
            expected_clients_per_round=case["clients"],
            bits=case["bits"],
            l2_clip=case["clip_norm"],
            mechanism="distributed_skellam",
            rotation_type="hd",
        )
        factory._client_dim = case["dimension"]
        factory._build_aggregation_factory()
        distributed_dp._heuristic_scale_factor = scale_of
        distributed_dp.discretization.inflated_l2_norm_bound = bound_of
        rows.append(seen)
    result_file.write_text(json.dumps(rows))


if __name__ == "__main__":
    {"train": train, "parameters": parameters}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
