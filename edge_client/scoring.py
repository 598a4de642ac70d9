"""What a model's outputs mean under its loss: predictions, and how good they are. Pure: numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.training import Evaluation, ExamplesRejected
from models.manifest import ModelManifest

Values = NDArray[np.float64]
HUBER_DELTA = 1.0


def predictions(manifest: ModelManifest, outputs: Values) -> NDArray[np.float32]:
    """What a caller is told, float32 (n, labels), of the graph's outputs (n, k).

    Class probabilities that add up to 1; or the probability of each label by itself; or values in the units
    of the raw target.
    """
    if manifest.loss == "sparse_categorical_crossentropy":
        result = np.exp(_log_softmax(outputs))
    elif manifest.loss == "binary_crossentropy":
        yes = _sigmoid(outputs)
        result = np.concatenate([1.0 - yes, yes], axis=1)
    elif manifest.loss == "multi_label_crossentropy":
        result = _sigmoid(outputs)
    else:
        result = outputs * manifest.target.std + manifest.target.mean
    return np.asarray(result, np.float32)


def scaled_targets(manifest: ModelManifest, y: NDArray[Any]) -> NDArray[Any]:
    """The truth as the graph takes it: int32 classes (n,), or float32 labels or scaled values (n, k).

    Raises:
        ExamplesRejected: another shape or dtype, a class beyond the last, or a label that is not 0 or 1.
    """
    target = manifest.target
    if y.dtype != np.dtype(target.dtype) or y.shape[1:] != target.shape:
        raise ExamplesRejected(
            f"targets are {y.dtype} (n, {', '.join(map(str, y.shape[1:]))}), "
            f"the model takes {target.dtype} (n, {', '.join(map(str, target.shape))})"
        )
    if manifest.regression:
        scaled = (y - np.asarray(target.mean)) / np.asarray(target.std)
        return np.asarray(scaled, np.float32)
    largest = len(manifest.labels) - 1 if target.dtype == "int32" else 1
    if len(y) and not (y.min() >= 0 and y.max() <= largest):
        raise ExamplesRejected(f"a target is not one of 0 to {largest}, as the model's labels need")
    return y


def evaluate(manifest: ModelManifest, outputs: Values, y: NDArray[Any]) -> Evaluation:
    """How outputs (n, k) do on targets as `scaled_targets` gives them; see `Evaluation`."""
    if manifest.regression:
        return _of_values(manifest, outputs, y.astype(np.float64))
    if manifest.loss == "sparse_categorical_crossentropy":
        loss = float(-_log_softmax(outputs)[np.arange(len(y)), y].mean())
        return _of_classes(loss, outputs.argmax(axis=1), y, len(manifest.labels))
    truth = y.reshape(outputs.shape)
    losses = np.logaddexp(0.0, outputs) - outputs * truth
    # Two classes, or yes and no for every label of every example.
    found = _of_classes(
        float(losses.mean()), (outputs > 0).ravel().astype(np.int64), truth.ravel().astype(np.int64), 2
    )
    return Evaluation(found.loss, found.accuracy, found.confusion, len(y))


def _of_classes(loss: float, predicted: NDArray[np.int64], y: NDArray[Any], classes: int) -> Evaluation:
    confusion = np.bincount(y * classes + predicted, minlength=classes * classes)
    return Evaluation(
        loss=loss,
        accuracy=float((predicted == y).mean()),
        confusion=confusion.reshape(classes, classes).astype(np.int64),
        example_count=len(y),
    )


def _of_values(manifest: ModelManifest, outputs: Values, y: Values) -> Evaluation:
    error = np.abs(outputs - y)
    near = np.minimum(error, HUBER_DELTA)
    losses = error * error if manifest.loss == "mean_squared_error" else near * (error - 0.5 * near)
    spread = float(((y - y.mean(axis=0)) ** 2).sum())
    explained = 1.0 - float((error * error).sum()) / spread if spread > 0 else 0.0
    return Evaluation(
        loss=float(losses.mean()),
        accuracy=max(explained, 0.0),
        confusion=np.zeros((0, 0), np.int64),
        example_count=len(y),
    )


def _log_softmax(logits: Values) -> Values:
    shifted: Values = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _sigmoid(x: Values) -> Values:
    result: Values = np.exp(-np.logaddexp(0.0, -x))
    return result
