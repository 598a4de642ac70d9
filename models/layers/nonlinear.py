"""Activation functions with gradients made of builtins; see `primitives` for why."""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from models.layers.primitives import Gradient, Tensor, differentiable, positive


@differentiable
def relu(x: Tensor) -> tuple[Tensor, Gradient]:
    """Rectified linear unit; the gradient at 0 is 0, as in TensorFlow."""
    y = tf.nn.relu(x)
    return y, lambda dy: dy * positive(y)


def capped_relu(x: Tensor, largest: float) -> Tensor:
    """ReLU that stays at `largest`; the gradient is 0 there."""

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        # ReLU6 is an operator, and is fused into the convolution before it.
        y = tf.nn.relu6(x) if largest == 6 else tf.minimum(tf.nn.relu(x), largest)
        return y, lambda dy: dy * positive(y) * positive(largest - y)

    return run(x)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x where it is over 0, else `slope` x."""

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        return tf.nn.leaky_relu(x, slope), lambda dy: dy * (slope + (1.0 - slope) * positive(tf.nn.relu(x)))

    return run(x)


def elu(x: Tensor) -> Tensor:
    """x where it is over 0, else exp(x) - 1."""

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.elu(x)
        return y, lambda dy: dy * (1.0 + tf.minimum(y, 0.0))

    return run(x)


@differentiable
def tanh(x: Tensor) -> tuple[Tensor, Gradient]:
    """Hyperbolic tangent."""
    y = tf.tanh(x)
    return y, lambda dy: dy * (1.0 - y * y)


@differentiable
def sigmoid(x: Tensor) -> tuple[Tensor, Gradient]:
    """1 / (1 + exp(-x))."""
    y = tf.sigmoid(x)
    return y, lambda dy: dy * y * (1.0 - y)


@differentiable
def swish(x: Tensor) -> tuple[Tensor, Gradient]:
    """x sigmoid(x)."""
    share = tf.sigmoid(x)
    y = x * share
    return y, lambda dy: dy * (share + y * (1.0 - share))


@differentiable
def softmax(x: Tensor) -> tuple[Tensor, Gradient]:
    """exp(x) over its sum along the last axis."""
    y = tf.nn.softmax(x)
    return y, lambda dy: y * (dy - tf.reduce_sum(dy * y, -1, keepdims=True))


@differentiable
def gelu(x: Tensor) -> tuple[Tensor, Gradient]:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    below = 0.5 + 0.5 * _erf(x * math.sqrt(0.5))

    def gradient(dy: Tensor) -> Tensor:
        density = tf.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
        return dy * (below + x * density)

    return x * below, gradient


def _erf(x: Tensor) -> Tensor:
    """The error function to 1.5e-7, which no builtin gives (Abramowitz and Stegun 1964, 7.1.26)."""
    size = tf.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * 1.061405429 - 1.453152027
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + coefficient
    return tf.sign(x) * (1.0 - series * t * tf.exp(-size * size))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": relu,
    "relu6": lambda x: capped_relu(x, 6.0),
    "leaky_relu": lambda x: leaky_relu(x, 0.2),
    "elu": elu,
    "gelu": gelu,
    "swish": swish,
    "silu": swish,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softmax": softmax,
}
"""By the name of the Keras (or `tf.nn`) function, with its default arguments."""
