"""Prove that an exported graph computes what Keras and TensorFlow compute. Needs TensorFlow."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.losses import stock_losses
from models.manifest import ModelManifest
from models.network import Network
from models.weights import entry_vectors

TOLERANCE = 1e-4
"""Largest accepted error of a gradient, relative to the largest entry of its parameter."""

ATTEMPTS = 3
EXAMPLES = 4
"""Examples whose gradients are compared one by one."""


def _runtimes() -> list[Any]:
    """What makes an interpreter of a graph: TensorFlow's own, and the small runtime installed beside it."""
    found = [tf.lite.Interpreter]
    for package in ("tflite_runtime", "ai_edge_litert"):
        if importlib.util.find_spec(package):
            found.append(importlib.import_module(f"{package}.interpreter").Interpreter)
    return found


RUNTIMES = _runtimes()


class ParityError(ValueError):
    """The exported graph differs from the Keras model."""


class GradientParityError(ParityError):
    """Only in a gradient."""


def prove_parity(
    model: Any, graph: bytes, manifest: ModelManifest, *, seed: int = 0, interpreter: Any = None
) -> float:
    """Compare logits, loss and every parameter's gradient on random data with stock TensorFlow.

    The data are random, the last two examples of the batch are padding with weight 0, and the others have
    random weights. The gradient is read from how far one step at learning rate 1 moves the weights: of Adam,
    whose first step tells only that, the sign of a gradient is compared.

    In a deep network now and then an input of a ReLU is so close to 0 that rounding decides on which side it
    is, in the graph and in TensorFlow. So a gradient that is off is tried on other data, twice: a wrong form
    is off on all of them.

    Args:
        model: the Keras model; left as it was.
        graph: the exported graph.
        manifest: of the graph.
        seed: of the random data.
        interpreter: makes an interpreter of `model_content`, with `num_threads`; by default TensorFlow's own.

    Returns:
        The largest relative error of a gradient.

    Raises:
        ParityError: a difference is over `TOLERANCE`; says of what.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _compare(model, graph, manifest, seed + attempt, interpreter)
        except GradientParityError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _compare(model: Any, graph: bytes, manifest: ModelManifest, seed: int, interpreter: Any) -> float:
    generator = np.random.default_rng(seed)
    batch = manifest.train_batch_size
    x = _inputs(manifest, generator)
    y = _targets(manifest, generator)
    mask = generator.uniform(0.5, 1.5, batch).astype(np.float32)
    if batch > 2:
        mask[-2:] = 0.0
    # Biases start at 0 in Keras, where a wrong bias would go unseen: try all parameters at random values.
    count = manifest.parameter_count + manifest.local_count
    start = 0.3 * generator.normal(size=count).astype(np.float32)
    loaded = (interpreter or tf.lite.Interpreter)(model_content=graph, num_threads=1)
    # As on the device: with XNNPACK.
    loaded.allocate_tensors()
    run = {name: loaded.get_signature_runner(name) for name in loaded.get_signature_list()}
    run["set_weights"](**entry_vectors(manifest, start))
    logits = run["infer"](x=x)["logits"]
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    more = {"keep": np.ones((batch, sum(part.size for part in manifest.dropouts)), np.float32)}
    more = {name: value for name, value in {**more, "last": one}.items() if name in _train_inputs(manifest)}
    loss = float(run["train"](x=x, y=y, mask=mask, lr=one, mu=zero, **more)["loss"])
    found = run["get_weights"]()
    moved = start - np.concatenate([found[name] for name in entry_vectors(manifest, start)])

    expected_logits, expected_loss, expected_gradients = _stock(model, start, manifest, x, y, mask)
    _check("logits", relative_error(logits, expected_logits))
    _check("loss", abs(loss - expected_loss) / max(abs(expected_loss), 1e-6))
    worst = 0.0
    for parameter, expected in zip(manifest.whole_layout, expected_gradients, strict=True):
        part = moved[parameter.offset : parameter.offset + parameter.size].reshape(parameter.shape)
        if manifest.optimizer.kind == "adam":
            # Adam's first step is g / (|g| + epsilon'): it tells the sign of a gradient, and that it is one.
            clear = np.abs(expected) > 1e-3 * max(float(np.abs(expected).max()), 1e-3)
            part, expected = (np.where(clear, np.sign(one), 0).astype(np.float32) for one in (part, expected))
        # The step was taken on weights of about 0.3 in float32: allow for their rounding.
        error = relative_error(part, expected, floor=1e-2)
        _check(f"gradient of {parameter.name}", error, GradientParityError)
        worst = max(worst, error)
    if manifest.example_gradients:
        worst = max(worst, _compare_examples(model, run, manifest, start, x, y))
    return worst


def _compare_examples(
    model: Any,
    run: dict[str, Any],
    manifest: ModelManifest,
    start: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[Any],
) -> float:
    """The same for the gradients of single examples, and for a step by a gradient from outside."""
    width = sum(part.size for part in manifest.dropouts)
    keep = {"keep": np.ones((1, width), np.float32)} if width else {}
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    worst = 0.0
    run["set_weights"](weights=start)
    for index in range(min(EXAMPLES, len(x))):
        alone = slice(index, index + 1)
        found = run["gradient"](x=x[alone], y=y[alone], **keep)["gradient"]
        _, _, expected = _stock(model, start, manifest, x[alone], y[alone], np.ones(1, np.float32))
        for parameter, gradient in zip(manifest.parameters, expected, strict=True):
            part = found[parameter.offset : parameter.offset + parameter.size].reshape(parameter.shape)
            error = relative_error(part, gradient, floor=1e-2)
            _check(f"gradient of {parameter.name} for one example", error, GradientParityError)
            worst = max(worst, error)
    direction = np.sign(start)
    run["apply"](gradient=direction, lr=one, mu=zero)
    # A first step at rate 1 is the gradient; Adam's is its sign, so that one value serves all of them.
    _check("step", relative_error(start - run["get_weights"]()["weights"], direction))
    return worst


def _train_inputs(manifest: ModelManifest) -> tuple[str, ...]:
    return next(signature.inputs for signature in manifest.signatures if signature.name == "train")


def _inputs(manifest: ModelManifest, generator: np.random.Generator) -> NDArray[np.float32]:
    shape = (manifest.train_batch_size, *manifest.input.shape)
    if manifest.input.vocabulary is not None:
        return generator.integers(0, manifest.input.vocabulary, shape).astype(np.float32)
    return generator.normal(size=shape).astype(np.float32)


def _targets(manifest: ModelManifest, generator: np.random.Generator) -> NDArray[Any]:
    batch, labels = manifest.train_batch_size, len(manifest.labels)
    if manifest.target.dtype == "int32":
        return generator.integers(0, labels, batch).astype(np.int32)
    if manifest.regression:
        return generator.normal(size=(batch, labels)).astype(np.float32)
    return generator.integers(0, 2, (batch, labels)).astype(np.float32)


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32], floor: float = 1e-6) -> float:
    """Largest absolute difference over the largest expected magnitude (at least `floor`)."""
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), floor))


def _stock(
    model: Any,
    start: NDArray[np.float32],
    manifest: ModelManifest,
    x: NDArray[np.float32],
    y: NDArray[Any],
    mask: NDArray[np.float32],
) -> tuple[NDArray[np.float32], float, list[NDArray[np.float32]]]:
    """Logits, loss and gradients by Keras's layers and TensorFlow's gradients; leaves the model as it was."""
    saved = model.get_weights()
    network = Network(model)
    by_name = dict(zip((part.name for part in network.parameters), network.variables, strict=True))
    variables = [by_name[parameter.name] for parameter in manifest.whole_layout]
    try:
        for parameter, variable in zip(manifest.whole_layout, variables, strict=True):
            part = start[parameter.offset : parameter.offset + parameter.size]
            variable.assign(part.reshape(parameter.shape))
        with tf.GradientTape() as tape:
            # Dropout keeps everything here, so training differs from inference in nothing.
            logits = model(x, training=False)
            losses = stock_losses(manifest.loss, logits, y)
            loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
        gradients = [tf.convert_to_tensor(part).numpy() for part in tape.gradient(loss, variables)]
    finally:
        model.set_weights(saved)
    return logits.numpy(), float(loss), gradients


def _check(what: str, error: float, kind: type[ParityError] = ParityError) -> None:
    if not error <= TOLERANCE:
        raise kind(f"the {what} is {error:.2g} off TensorFlow's, over {TOLERANCE:g}")
