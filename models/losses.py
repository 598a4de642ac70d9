"""Losses with gradients made of builtins, and TensorFlow's own to prove them by. Needs TensorFlow.

Every loss is a sum over examples, each weighted by its `share`: with shares that add up to 1 it is a weighted
mean, and an example with share 0 has no part in the loss or the gradient, so that a padded batch is exact.
Natural logarithms: cross-entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from models.layers.primitives import Gradient, Tensor, differentiable
from models.manifest import LossName

HUBER_DELTA = 1.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def sparse_cross_entropy(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Softmax cross-entropy of logits (n, k) under int32 classes (n,), weighted by share (n,); a scalar."""

    @differentiable
    def run(logits: Tensor) -> tuple[Tensor, Gradient]:
        shifted = logits - tf.reduce_max(logits, 1, keepdims=True)
        exponentials = tf.exp(shifted)
        total = tf.reduce_sum(exponentials, 1, keepdims=True)
        truth = tf.one_hot(labels, logits.shape[1])
        losses = tf.math.log(total) - tf.reduce_sum(truth * shifted, 1, keepdims=True)
        each = tf.reshape(share, [-1, 1])
        loss = tf.reduce_sum(losses * each)
        return loss, lambda dy: dy * each * (exponentials / total - truth)

    return run(logits)


def binary_cross_entropy(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy of one logit (n, 1), that of class 1, under int32 classes 0 and 1 (n,); a scalar."""
    return multi_label_cross_entropy(logits, tf.reshape(tf.cast(labels, tf.float32), [-1, 1]), share)


def multi_label_cross_entropy(logits: Tensor, truth: Tensor, share: Tensor) -> Tensor:
    """Mean over labels of the cross-entropy of logits (n, k) under truth (n, k) of 0 and 1; a scalar."""

    @differentiable
    def run(logits: Tensor) -> tuple[Tensor, Gradient]:
        each = tf.reshape(share, [-1, 1]) * (1.0 / logits.shape[1])
        # log(1 + exp(z)) - z y, without overflow.
        losses = tf.nn.relu(logits) - logits * truth + tf.math.log(1.0 + tf.exp(-tf.abs(logits)))
        return tf.reduce_sum(losses * each), lambda dy: dy * each * (tf.sigmoid(logits) - truth)

    return run(logits)


def mean_squared(values: Tensor, truth: Tensor, share: Tensor) -> Tensor:
    """Mean over values of the squared error of values (n, k) under truth (n, k); a scalar."""

    @differentiable
    def run(values: Tensor) -> tuple[Tensor, Gradient]:
        each = tf.reshape(share, [-1, 1]) * (1.0 / values.shape[1])
        error = values - truth
        return tf.reduce_sum(error * error * each), lambda dy: dy * 2.0 * each * error

    return run(values)


def huber(values: Tensor, truth: Tensor, share: Tensor) -> Tensor:
    """Mean over values of the Huber loss: squared error up to 1, linear beyond; a scalar."""

    @differentiable
    def run(values: Tensor) -> tuple[Tensor, Gradient]:
        each = tf.reshape(share, [-1, 1]) * (1.0 / values.shape[1])
        error = values - truth
        size = tf.abs(error)
        near = tf.minimum(size, HUBER_DELTA)
        losses = near * (size - 0.5 * near)
        return tf.reduce_sum(losses * each), lambda dy: dy * each * near * tf.sign(error)

    return run(values)


LOSSES: dict[LossName, Loss] = {
    "sparse_categorical_crossentropy": sparse_cross_entropy,
    "binary_crossentropy": binary_cross_entropy,
    "multi_label_crossentropy": multi_label_cross_entropy,
    "mean_squared_error": mean_squared,
    "huber": huber,
}


def stock_losses(name: LossName, outputs: Tensor, truth: Tensor) -> Tensor:
    """The loss of each example (n,) as TensorFlow and Keras compute it: the other side of the proof."""
    if name == "sparse_categorical_crossentropy":
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=truth, logits=outputs)
    if name == "mean_squared_error":
        return tf.keras.losses.mean_squared_error(truth, outputs)
    if name == "huber":
        return tf.keras.losses.huber(truth, outputs, delta=HUBER_DELTA)
    truth = tf.reshape(tf.cast(truth, tf.float32), outputs.shape)
    return tf.keras.losses.binary_crossentropy(truth, outputs, from_logits=True)
