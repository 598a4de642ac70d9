"""Prove that an exported graph computes what Keras and TensorFlow compute. Needs TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.manifest import ModelManifest

TOLERANCE = 1e-4
"""Largest accepted error of a gradient, relative to the largest entry of its parameter."""


class ParityError(ValueError):
    """The exported graph differs from the Keras model."""


def prove_parity(model: Any, graph: bytes, manifest: ModelManifest, *, seed: int = 0) -> float:
    """Compare logits, loss and every parameter's gradient on random data with stock TensorFlow.

    The data are random, the last two examples of the batch are padding with weight 0, and the others have
    random weights. The gradient is read from how far one step at learning rate 1 moves the weights.

    Returns:
        The largest relative error of a gradient.

    Raises:
        ParityError: a difference is over `TOLERANCE`; says of what.
    """
    generator = np.random.default_rng(seed)
    batch = manifest.train_batch_size
    x = generator.normal(size=(batch, *manifest.input.shape)).astype(np.float32)
    y = generator.integers(0, len(manifest.labels), batch).astype(np.int32)
    mask = generator.uniform(0.5, 1.5, batch).astype(np.float32)
    if batch > 2:
        mask[-2:] = 0.0
    # Biases start at 0 in Keras, where a wrong bias would go unseen: try all parameters at random values.
    start = 0.3 * generator.normal(size=manifest.parameter_count).astype(np.float32)
    interpreter = tf.lite.Interpreter(model_content=graph, num_threads=1)
    run = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
    run["set_weights"](weights=start)
    logits = run["infer"](x=x)["logits"]
    one, zero = np.array(1.0, np.float32), np.array(0.0, np.float32)
    loss = float(run["train"](x=x, y=y, mask=mask, lr=one, mu=zero)["loss"])
    gradient = start - run["get_weights"]()["weights"]

    expected_logits, expected_loss, expected_gradients = _stock(model, start, manifest, x, y, mask)
    _check("logits", relative_error(logits, expected_logits))
    _check("loss", abs(loss - expected_loss) / max(abs(expected_loss), 1e-6))
    worst = 0.0
    for parameter, expected in zip(manifest.parameters, expected_gradients, strict=True):
        part = gradient[parameter.offset : parameter.offset + parameter.size].reshape(parameter.shape)
        # The step was taken on weights of about 0.3 in float32: allow for their rounding.
        error = relative_error(part, expected, floor=1e-2)
        _check(f"gradient of {parameter.name}", error)
        worst = max(worst, error)
    return worst


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32], floor: float = 1e-6) -> float:
    """Largest absolute difference over the largest expected magnitude (at least `floor`)."""
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), floor))


def _stock(
    model: Any,
    start: NDArray[np.float32],
    manifest: ModelManifest,
    x: NDArray[np.float32],
    y: NDArray[np.int32],
    mask: NDArray[np.float32],
) -> tuple[NDArray[np.float32], float, list[NDArray[np.float32]]]:
    """Logits, loss and gradients by Keras's layers and TensorFlow's gradients; leaves the model as it was."""
    saved = model.get_weights()
    variables = [variable for layer in model.layers for variable in layer.weights]
    try:
        for parameter, variable in zip(manifest.parameters, variables, strict=True):
            part = start[parameter.offset : parameter.offset + parameter.size]
            variable.assign(part.reshape(parameter.shape))
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
        gradients = [gradient.numpy() for gradient in tape.gradient(loss, variables)]
    finally:
        model.set_weights(saved)
    return logits.numpy(), float(loss), gradients


def _check(what: str, error: float) -> None:
    if not error <= TOLERANCE:
        raise ParityError(f"the {what} is {error:.2g} off TensorFlow's, over {TOLERANCE:g}")
