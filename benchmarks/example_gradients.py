"""What the gradients of single examples cost on a device: one at a time, or many in one call.

    python benchmarks/example_gradients.py [--json FILE]

For each model the processor time of one example, in microseconds, with one thread of this machine's small
runtime: in a `train` call of 32; by the entry point `gradient`, one call an example, as mode example does it;
and by two graphs that give 32 of them in one call, one by TensorFlow's vectorised map and one by 32 copies
of the network. Then what clipping to the grid takes for an example, and noise for a step. The bytes of the
graphs show what many in one call would cost on the wire. Needs TensorFlow, to make the graphs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from edge_client.adapters.tflite import Interpreter
from models.architectures import ARCHITECTURES
from models.architectures.architecture import Architecture
from models.export import export
from models.flatbuffer import operators
from models.graph_file import OPERATORS
from models.losses import LOSSES
from models.manifest import OptimizerSpec
from models.network import Network
from protocol.dp.example import mechanism_of, noisy_gradient, quantised
from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution

NAMES = ("watch", "digits")
BATCH = 32
REPEATS, CALLS = 5, 20


@dataclass(frozen=True)
class Result:
    """Microseconds of processor time for one example unless it says otherwise; None where nothing ran."""

    model: str
    parameters: int
    train: float
    one_a_call: float
    vectorised: float | None
    copies: float | None
    clip: float
    noise_a_step: float
    graph_bytes: int
    vectorised_bytes: int | None
    copies_bytes: int | None
    vectorised_refused: str
    """Operators of the vectorised graph that devices refuse."""


def microseconds(call: Callable[[], object], examples: int) -> float:
    """The best of some repetitions, of which each is many calls."""
    best = float("inf")
    call()
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - start) / CALLS)
    return 1e6 * best / examples


def measure(name: str) -> Result:
    architecture = ARCHITECTURES[name]
    made = export(
        architecture.build_seeded(),
        name=name,
        labels=architecture.labels,
        scaling=architecture.scaling,
        train_batch_size=BATCH,
        loss=architecture.loss,
        target=architecture.target,
        optimizer=OptimizerSpec(kind=architecture.optimizer),
        example_gradients=True,
    )
    run = Interpreter(model_content=made.graph, num_threads=1)
    runner = {entry: run.get_signature_runner(entry) for entry in run.get_signature_list()}
    runner["set_weights"](weights=made.weights)
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, *made.manifest.input.shape)).astype(np.float32)
    target = made.manifest.target
    y = random.integers(0, 2, (BATCH, *target.shape)).astype(target.dtype)
    rates = {"lr": np.array(1e-9, np.float32), "mu": np.array(0.0, np.float32)}
    mask = np.ones(BATCH, np.float32)
    example = ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0, sampling_probability=0.1)
    mechanism = mechanism_of(example, NoiseDistribution.SKELLAM, made.manifest.parameter_count)
    gradient = runner["gradient"](x=x[:1], y=y[:1])["gradient"]
    sampler, total = mechanism.sampler(), np.zeros(mechanism.dimension, np.int64)
    many = {label: _graph(architecture, together) for label, together in (("map", True), ("copies", False))}
    return Result(
        model=name,
        parameters=made.manifest.parameter_count,
        train=microseconds(lambda: runner["train"](x=x, y=y, mask=mask, **rates), BATCH),
        one_a_call=microseconds(lambda: runner["gradient"](x=x[:1], y=y[:1]), 1),
        vectorised=_time_many(many["map"], x, y),
        copies=_time_many(many["copies"], x, y),
        clip=microseconds(lambda: quantised(mechanism, gradient), 1),
        noise_a_step=microseconds(lambda: noisy_gradient(mechanism, total, 100, bytes(32), sampler), 1),
        graph_bytes=len(made.graph),
        vectorised_bytes=None if many["map"] is None else len(many["map"]),
        copies_bytes=None if many["copies"] is None else len(many["copies"]),
        vectorised_refused=" ".join(sorted(set(operators(many["map"] or b"")) - set(OPERATORS.values())))
        if many["map"]
        else "",
    )


def _graph(architecture: Architecture, together: bool) -> bytes | None:
    """A graph with the gradients of 32 examples in one call; None if the converter makes none of builtins."""
    network = Network(architecture.build_seeded())
    module = tf.Module()
    module.theta = tf.Variable(network.flat_weights())
    target = architecture.target
    classes = architecture.loss in {"sparse_categorical_crossentropy", "binary_crossentropy"}
    kind = tf.int32 if classes else tf.float32
    truth: list[int] = [] if classes else list(target.shape if target else (len(architecture.labels),))

    def one(theta: Any, x: Any, y: Any) -> Any:
        values = network.split(theta)
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = LOSSES[architecture.loss](network.forward(values, x[None]), y[None], tf.ones([1]))
        return tf.concat([tf.reshape(part, [-1]) for part in tape.gradient(loss, values)], 0)

    def gradients(x: Any, y: Any) -> dict[str, Any]:
        theta = module.theta.read_value()
        if together:
            return {"gradients": tf.vectorized_map(lambda pair: one(theta, *pair), (x, y))}
        return {"gradients": tf.stack([one(theta, x[index], y[index]) for index in range(BATCH)])}

    shapes = [
        tf.TensorSpec([BATCH, *network.example_shape], tf.float32, "x"),
        tf.TensorSpec([BATCH, *truth], kind, "y"),
    ]
    function = tf.function(gradients, input_signature=shapes, autograph=False).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    converter.experimental_enable_resource_variables = True
    try:
        return bytes(converter.convert())
    except Exception as error:
        if type(error).__name__ != "ConverterError":
            raise
        return None


def _time_many(graph: bytes | None, x: Any, y: Any) -> float | None:
    if graph is None:
        return None
    run = Interpreter(model_content=graph, num_threads=1)
    run.allocate_tensors()
    inputs = {detail["name"].split(":")[0]: detail["index"] for detail in run.get_input_details()}

    def call() -> Any:
        for name, value in (("x", x), ("y", y)):
            if name in inputs:
                run.set_tensor(inputs[name], value)
        run.invoke()
        return run.get_tensor(run.get_output_details()[0]["index"])

    try:
        return microseconds(call, BATCH)
    except RuntimeError:
        return None  # it converts, and the small runtime cannot run it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    results = [measure(name) for name in NAMES]
    for result in results:
        print(" ".join(f"{key} {_text(value)}" for key, value in asdict(result).items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def _text(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


if __name__ == "__main__":
    main()
