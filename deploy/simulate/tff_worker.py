"""Trains with TensorFlow Federated. A program of its own, run by TFF's interpreter (`deploy.simulate.tff`).

    python -P tff_worker.py TASK_DIRECTORY RESULT_FD

Of Covey it imports `models` alone. Everything random but the noise comes with the task. It ends with its
whole process group, TFF's executor too, as soon as its standard input is closed: when its parent ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from models.architectures.source import load_architecture
from models.network import Network

# The nearest that TFF has to `aggregator.optimizers`. Its Adagrad has epsilon under the root; its Adam
# corrects the bias of its moments, and starts the second at 0: the others agree.
SERVERS = {
    "fedavg": lambda rate, tau: tff.learning.optimizers.build_sgdm(rate),
    "fedavgm": lambda rate, tau: tff.learning.optimizers.build_sgdm(rate, momentum=0.9),
    "fedadagrad": lambda rate, tau: tff.learning.optimizers.build_adagrad(
        rate, initial_preconditioner_value=tau**2, epsilon=tau**2
    ),
    "fedadam": lambda rate, tau: tff.learning.optimizers.build_adam(
        rate, beta_1=0.9, beta_2=0.99, epsilon=tau
    ),
    "fedyogi": lambda rate, tau: tff.learning.optimizers.build_yogi(
        rate, beta_1=0.9, beta_2=0.99, epsilon=tau, initial_preconditioner_value=tau**2
    ),
}


def die_with_parent() -> None:
    """Ends the process group when standard input is closed; the kernel closes it whatever ends the parent."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def lift_nesting_limit() -> None:
    """Lets protocol buffers nest more than 100 deep, as the computations of secure sums do.

    Without it TFF fails with `DecodeError: Error parsing message` where it parses what it serialised itself.
    """
    try:
        from google._upb import _message
    except ImportError:
        return  # the other implementations have no such limit
    _message.SetAllowOversizeProtos(True)


def loss_of(name: str) -> Any:
    """The Keras loss that a manifest names."""
    losses = tf.keras.losses
    if name == "sparse_categorical_crossentropy":
        return losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "mean_squared_error":
        return losses.MeanSquaredError()
    if name == "huber":
        return losses.Huber(delta=1.0)
    return losses.BinaryCrossentropy(from_logits=True)


def client_optimizer(spec: dict[str, Any], rate: float) -> Any:
    """The devices' optimizer."""
    if spec["kind"] == "adam":
        return tff.learning.optimizers.build_adam(rate, spec["beta_1"], spec["beta_2"], spec["epsilon"])
    momentum = spec["beta_1"] if spec["kind"] == "momentum" else None
    return tff.learning.optimizers.build_sgdm(rate, momentum=momentum)


def aggregator(task: dict[str, Any]) -> Any:
    """Clips every update, adds them up, and adds the noise of the privacy mode."""
    privacy, clients = task["privacy"], task["cohort"]
    clip, adaptive = privacy["clip_norm"], privacy["adaptive"]
    aggregators = tff.aggregators
    if privacy["mode"] == "none":
        return aggregators.clipping_factory(clip, aggregators.UnweightedMeanFactory())
    if privacy["mode"] == "central" and adaptive is not None:
        return aggregators.DifferentiallyPrivateFactory.gaussian_adaptive(
            privacy["noise_multiplier"],
            clients,
            initial_l2_norm_clip=clip,
            target_unclipped_quantile=adaptive["quantile"],
            learning_rate=adaptive["learning_rate"],
        )
    if privacy["mode"] == "central":
        return aggregators.DifferentiallyPrivateFactory.gaussian_fixed(
            privacy["noise_multiplier"], clients, clip
        )
    # As `tff.learning.ddp_secure_aggregator` composes it, with a clip norm that stays. TFF sizes the noise
    # for all clients; a plan sizes it for the fewest survivors.
    return aggregators.UnweightedMeanFactory(
        value_sum_factory=aggregators.distributed_dp.DistributedDpSumFactory(
            noise_multiplier=privacy["noise_multiplier"] * (clients / task["min_survivors"]) ** 0.5,
            expected_clients_per_round=clients,
            bits=privacy["bits"],
            l2_clip=clip,
            mechanism=f"distributed_{'skellam' if privacy['noise'] == 'skellam' else 'dgauss'}",
            rotation_type="hd",
        ),
        count_sum_factory=aggregators.SumFactory(),
    )


class Clients:
    """The devices' examples as TFF takes them, in the order in which a device would go through them."""

    def __init__(self, directory: Path, task: dict[str, Any]) -> None:
        self._examples = np.load(directory / "devices.npz")
        self._task = task

    def dataset(self, number: int, device: int) -> Any:
        """Batches of all local epochs of one device in one round."""
        task = self._task
        x, y = self._examples[f"x{device}"], self._examples[f"y{device}"]
        if task["loss"] == "binary_crossentropy":
            y = y.reshape(-1, 1).astype(np.float32)
        generator = np.random.default_rng([task["seed"], number, device])
        batches = None
        for _ in range(task["local_epochs"]):
            order = generator.permutation(len(y))
            # A step of the device is this many examples; its last one may be smaller.
            epoch = tf.data.Dataset.from_tensor_slices((x[order], y[order])).batch(task["step"])
            batches = epoch if batches is None else batches.concatenate(epoch)
        return batches


class Weights:
    """The flat vector of a manifest, and the tensors of Keras."""

    def __init__(self, model: Any, count: int) -> None:
        trainable = [id(variable) for variable in model.trainable_variables]
        network = Network(model)
        self._places = [trainable.index(id(variable)) for variable in network.variables]
        self._shapes = [tuple(variable.shape) for variable in network.variables]
        self._frozen = [variable.numpy() for variable in model.non_trainable_variables]
        found = sum(int(np.prod(shape)) for shape in self._shapes)
        if found != count or len(self._places) != len(trainable):
            raise ValueError(f"the Keras model trains {found} parameters, its export {count}")

    def tensors(self, vector: Any) -> Any:
        """As `ModelWeights`."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        parts = np.split(vector, ends[:-1])
        trainable: list[Any] = [None] * len(parts)
        for place, part, shape in zip(self._places, parts, self._shapes, strict=True):
            trainable[place] = part.reshape(shape)
        return tff.learning.models.ModelWeights(trainable, self._frozen)

    def vector(self, weights: Any) -> Any:
        """As a flat float32 vector."""
        parts = [np.asarray(weights.trainable[place]).ravel() for place in self._places]
        return np.concatenate(parts).astype(np.float32)


def figures(metrics: Any) -> dict[str, float]:
    """What TFF's distributed mechanism says of itself; empty in other modes."""
    seen = metrics.get("aggregator", {})
    found = seen.get("mean_value", {}) if hasattr(seen, "get") else {}
    names = ("scaled_inflated_l2", "scaled_local_stddev", "padded_dim")
    if not hasattr(found, "get") or names[0] not in found:
        return {}
    return {name: float(found[name]) for name in names}


def run(directory: Path, say: Any) -> None:
    """Trains, and writes the weights after every round."""
    task = json.loads((directory / "task.json").read_text())
    if task["privacy"]["mode"] == "distributed":
        lift_nesting_limit()
        # The one context that knows secure sums. They protect nothing in one process, and need not.
        tff.backends.test.set_sync_test_cpp_execution_context()
    architecture = load_architecture(task["source"])
    start = np.load(directory / "weights.npy")
    weights = Weights(architecture.build_seeded(), len(start))
    clients = Clients(directory, task)
    element = clients.dataset(1, task["cohorts"][0][0]).element_spec

    def model_fn() -> Any:
        return tff.learning.models.from_keras_model(
            architecture.build(), loss=loss_of(task["loss"]), input_spec=element
        )

    more: dict[str, Any] = {}
    build = tff.learning.algorithms.build_unweighted_fed_avg
    if task["proximal_mu"]:
        build = tff.learning.algorithms.build_unweighted_fed_prox
        more["proximal_strength"] = task["proximal_mu"]
    process = build(
        model_fn,
        client_optimizer_fn=client_optimizer(task["optimizer"], task["learning_rate"]),
        server_optimizer_fn=SERVERS[task["server"]](task["server_rate"], task["server_tau"]),
        model_aggregator=aggregator(task),
        **more,
    )
    state = process.set_model_weights(process.initialize(), weights.tensors(start))
    for number, cohort in enumerate(task["cohorts"], start=1):
        began = time.perf_counter()
        output = process.next(state, [clients.dataset(number, device) for device in cohort])
        state = output.state
        np.save(directory / f"round-{number}.npy", weights.vector(process.get_model_weights(state)))
        say(round=number, seconds=time.perf_counter() - began, **figures(output.metrics))


def main() -> None:
    """Runs the task, and waits to be ended: the group must outlive no one, and its leader ends last."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    directory = Path(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as results:

        def say(**fields: Any) -> None:
            results.write(json.dumps(fields) + "\n")

        try:
            run(directory, say)
        except Exception as error:
            import traceback

            traceback.print_exc()
            say(error=f"{type(error).__name__}: {str(error).strip()[:2000]}")
    threading.Event().wait()


if __name__ == "__main__":
    main()
