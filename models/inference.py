"""Graphs for prediction alone, in three precisions, and what each costs in accuracy. Needs TensorFlow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models import graph_file
from models.examples import Examples, InvalidExamples
from models.flatbuffer import compact
from models.layers import looping
from models.losses import stock_losses
from models.manifest import LOCAL_SIGNATURE, ModelManifest
from models.network import Network

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
BATCH = 32
REPRESENTATIVE = 200


@dataclass(frozen=True, slots=True)
class Score:
    """One graph on labelled examples.

    Attributes:
        graph: `trainable`, or a precision.
        size: bytes of its files.
        loss: mean loss.
        accuracy: share of examples, or of labels, that are right; for values, share of variance explained.
    """

    graph: str
    size: int
    loss: float
    accuracy: float


def file_name(precision: Precision) -> str:
    """Name of an inference file in a model's directory."""
    return f"inference-{precision}.tflite"


def convert(
    network: Network,
    weights: NDArray[np.float32],
    precision: Precision,
    scaled: NDArray[np.float32] | None = None,
) -> bytes:
    """A graph from scaled inputs (b, ...) to outputs (b, k), both float32, with the weights as constants.

    Args:
        network: the model.
        weights: its parameters, float32, shape (d,).
        precision: of its constants; `int8` also computes in 8 bits where operators can.
        scaled: representative inputs, which `int8` takes its ranges from.

    Raises:
        ValueError: `int8` without representative inputs.
    """
    if precision == "int8" and scaled is None:
        raise ValueError("int8 needs representative examples")
    values = [tf.constant(part) for part in network.split(tf.constant(weights))]
    signature = [tf.TensorSpec([None, *network.example_shape], tf.float32, "x")]
    predict = tf.function(lambda x: network.forward(values, x), input_signature=signature, autograph=False)
    with looping.written_out() if precision == "int8" else nullcontext():
        concrete = predict.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], predict)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if scaled is not None and precision == "int8":
        rows = scaled[:REPRESENTATIVE, np.newaxis]
        converter.representative_dataset = lambda: ([row] for row in rows)
    with warnings.catch_warnings():
        # The ranges of inputs come from the representative examples, which the converter does not count.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs", UserWarning)
        return compact(bytes(converter.convert()))


def set_start(interpreter: Any, manifest: ModelManifest, weights: NDArray[np.float32]) -> None:
    """Give a trainable graph its shared parameters, and the local ones that it starts from."""
    more = interpreter.get_signature_runner(LOCAL_SIGNATURE)() if manifest.local_parameters else {}
    interpreter.get_signature_runner("set_weights")(weights=weights, **more)


def scaled_inputs(manifest: ModelManifest, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Raw inputs as the graph takes them.

    Raises:
        InvalidExamples: there are none, of another shape than the model's, or an id is beyond its last.
    """
    shape, ids = manifest.input.shape, manifest.input.vocabulary
    if not len(x) or x.shape[1:] != shape:
        raise InvalidExamples(f"x has the shape {x.shape}, the model takes (n, {', '.join(map(str, shape))})")
    if ids is not None and not (x.min() >= 0 and x.max() < ids):
        raise InvalidExamples(f"an id in x is not one of 0 to {ids - 1}")
    scaled = (x - np.asarray(manifest.input.mean)) / np.asarray(manifest.input.std)
    return np.asarray(scaled, np.float32)


def evaluate(directory: Path, manifest: ModelManifest, examples: Examples) -> Iterator[Score]:
    """The trainable graph with its weights file, and every inference file beside it, on the same examples.

    Raises:
        InvalidExamples: inputs or targets are not those of the model.
        InvalidGraph: an inference file is damaged.
    """
    x = scaled_inputs(manifest, examples.x)
    _check_targets(manifest, examples.y)
    graph, weights = (directory / "model.tflite").read_bytes(), (directory / "weights.bin").read_bytes()
    interpreter = tf.lite.Interpreter(model_content=graph, num_threads=1)
    interpreter.allocate_tensors()
    set_start(interpreter, manifest, np.frombuffer(weights, "<f4"))
    infer = interpreter.get_signature_runner("infer")
    outputs = [infer(x=x[start : start + BATCH])["logits"] for start in range(0, len(x), BATCH)]
    yield _score("trainable", len(graph) + len(weights), manifest, np.concatenate(outputs), examples)
    for precision in PRECISIONS:
        path = directory / file_name(precision)
        if path.is_file():
            content = path.read_bytes()
            # A runtime would die of a damaged one.
            graph_file.read(content)
            yield _score(precision, len(content), manifest, _run(content, x), examples)


def _check_targets(manifest: ModelManifest, y: NDArray[Any]) -> None:
    target = manifest.target
    if y.dtype != np.dtype(target.dtype) or y.shape[1:] != target.shape:
        wanted = "int32 classes (n,)" if target.dtype == "int32" else f"float32 (n, {target.shape[0]})"
        raise InvalidExamples(f"y is {y.dtype} {y.shape}, the model is trained by {wanted}")
    largest = len(manifest.labels) - 1 if target.dtype == "int32" else 1
    if not manifest.regression and not (y.min() >= 0 and y.max() <= largest):
        raise InvalidExamples(f"a target is not one of 0 to {largest}, as the model's labels need")


def _run(graph: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (n, k) of scaled inputs x (n, ...), always in batches of one size.

    With float16 weights XNNPACK of TensorFlow 2.14 gives anything at all once an interpreter gets another.
    """
    interpreter = tf.lite.Interpreter(model_content=graph, num_threads=1)
    place, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(place, (BATCH, *x.shape[1:]))
    interpreter.allocate_tensors()
    outputs = []
    for start in range(0, len(x), BATCH):
        part = x[start : start + BATCH]
        interpreter.set_tensor(place, np.concatenate([part, np.repeat(part[:1], BATCH - len(part), 0)]))
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(result)[: len(part)])
    return np.concatenate(outputs)


def _score(name: str, size: int, manifest: ModelManifest, outputs: Any, examples: Examples) -> Score:
    y = examples.y
    if manifest.regression:
        y = ((y - np.asarray(manifest.target.mean)) / np.asarray(manifest.target.std)).astype(np.float32)
        spread = float(((y - y.mean(axis=0)) ** 2).sum())
        accuracy = max(1.0 - float(((outputs - y) ** 2).sum()) / spread, 0.0) if spread else 0.0
    elif manifest.loss == "sparse_categorical_crossentropy":
        accuracy = float((outputs.argmax(axis=1) == y).mean())
    else:
        accuracy = float(((outputs > 0) == (y.reshape(outputs.shape) > 0)).mean())
    loss = float(tf.reduce_mean(stock_losses(manifest.loss, tf.constant(outputs), tf.constant(y))))
    return Score(name, size, loss, accuracy)
