"""Differentiable operations whose forward *and* backward forms convert to TensorFlow Lite builtins.

TensorFlow's own gradients of many operations (`ReluGrad`, `Conv2DBackpropFilter`, `MaxPoolGrad` ...) have no
builtin form and would need the Flex delegate, which the small runtimes lack (tensorflow/tensorflow#54244).
Each function here and in the modules beside it carries its gradient, so that a layer only composes functions
and `tf.GradientTape` does the rest; operations whose stock gradient is made of builtins (reshape, add of
equal shapes, split, stack ...) need no entry.

Two rules keep the file small and the result right. Never make a constant of the size of an activation or of a
parameter (`zeros_like` of a static shape is folded into the file). Never multiply by a variable of two axes
(`tf.matmul`, `x @ w`), but by `linear`: the converter first makes it a fully connected operation, fuses the
activation that follows, then rewrites it as a batch matrix product and *loses* the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import tensorflow as tf

Gradient = Callable[..., Any]
Tensor = Any
"""A `tf.Tensor`; TensorFlow ships no types that mypy reads."""


def differentiable(function: Callable[..., tuple[Tensor, Gradient]]) -> Callable[..., Tensor]:
    """A function that returns its result and its gradient, as one that `tf.GradientTape` understands."""
    return cast("Callable[..., Tensor]", tf.custom_gradient(function))


def positive(x: Tensor) -> Tensor:
    """1 where x >= 0 is over 0, else 0.

    By the sign, since comparing, casting and selecting are ten times slower in the small runtimes.
    """
    return tf.sign(x)


@differentiable
def add_bias(x: Tensor, bias: Tensor) -> tuple[Tensor, Gradient]:
    """Add a bias (c,) to the last axis of x (..., c)."""
    axes = list(range(x.shape.rank - 1))
    return x + bias, lambda dy: (dy, tf.reduce_sum(dy, axes))


@differentiable
def scale(x: Tensor, factor: Tensor) -> tuple[Tensor, Gradient]:
    """Multiply the last axis of x (..., c) by a factor (c,)."""
    axes = list(range(x.shape.rank - 1))
    return x * factor, lambda dy: (dy * factor, tf.reduce_sum(dy * x, axes))


@differentiable
def linear(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
    """The last axis of x (..., i) times w (i, o): shape (..., o)."""

    def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
        flat = [tf.reshape(part, [-1, part.shape[-1]]) for part in (x, dy)]
        return _times(dy, tf.transpose(w)), _product(*flat, left=True)

    return _times(x, w), gradient


def _times(x: Tensor, w: Tensor) -> Tensor:
    """x (..., i) times w (i, o), as one product in a batch.

    With a matrix of two axes it would become a fully connected operation, which takes four times as long with
    weights that are no constant.
    """
    if x.shape.rank == 2 and x.shape[0] == 1:
        # The converter simplifies a batch of one row to a product of wrong ranks, and stops.
        return _product(x, w)
    y = _product(tf.reshape(x, [1, -1, x.shape[-1]]), tf.expand_dims(w, 0))
    return tf.reshape(y, [-1, *x.shape[1:-1], w.shape[-1]])


@differentiable
def batch_product(x: Tensor, y: Tensor) -> tuple[Tensor, Gradient]:
    """Matrix products of x (..., a, b) and y (..., b, c) with equal leading axes."""

    def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
        return _product(dy, y, right=True), _product(x, dy, left=True)

    return _product(x, y), gradient


def _product(x: Tensor, y: Tensor, *, left: bool = False, right: bool = False) -> Tensor:
    return tf.raw_ops.BatchMatMulV2(x=x, y=y, adj_x=left, adj_y=right)


@differentiable
def add(x: Tensor, y: Tensor) -> tuple[Tensor, Gradient]:
    """Sum of two tensors; an axis of length 1 is repeated."""
    return x + y, lambda dy: (_collapsed(dy, x), _collapsed(dy, y))


@differentiable
def multiply(x: Tensor, y: Tensor) -> tuple[Tensor, Gradient]:
    """Product of two tensors, entry by entry; an axis of length 1 is repeated."""
    return x * y, lambda dy: (_collapsed(dy * y, x), _collapsed(dy * x, y))


def _collapsed(dy: Tensor, x: Tensor) -> Tensor:
    """Sum dy over the axes along which x of the same rank was repeated."""
    # Axis 0 is the batch, and never repeated.
    axes = [axis for axis in range(1, x.shape.rank) if x.shape[axis] == 1 and dy.shape[axis] != 1]
    return tf.reduce_sum(dy, axes, keepdims=True) if axes else dy


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Join tensors along an axis (counted from 0, not the batch)."""
    sizes = [int(part.shape[axis]) for part in parts]

    @differentiable
    def run(*parts: Tensor) -> tuple[Tensor, Gradient]:
        return tf.concat(parts, axis), lambda dy: tf.split(dy, sizes, axis)

    return run(*parts)


def transpose(x: Tensor, order: Sequence[int]) -> Tensor:
    """The axes of x in another order."""
    back = [list(order).index(axis) for axis in range(len(order))]

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        return tf.transpose(x, list(order)), lambda dy: tf.transpose(dy, back)

    return run(x)


def pad(x: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around x: so many before and after, for each axis."""
    sizes = list(x.shape)

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        begin = [before for before, _ in paddings]
        return tf.pad(x, [list(pair) for pair in paddings]), lambda dy: tf.slice(
            dy, begin, [-1 if size is None else size for size in sizes]
        )

    return run(x)


@differentiable
def look_up(ids: Tensor, table: Tensor) -> tuple[Tensor, Gradient]:
    """Rows of a table (v, d) for int32 ids (n, t): shape (n, t, d)."""

    def gradient(dy: Tensor) -> tuple[None, Tensor]:
        rows = tf.reshape(dy, [-1, table.shape[1]])
        # Adds up the rows of an id that occurs more than once.
        return None, tf.scatter_nd(tf.reshape(ids, [-1, 1]), rows, table.shape)

    return tf.gather(table, ids), gradient


def normalise(x: Tensor, epsilon: float) -> Tensor:
    """x less its mean over the last axis, divided by its standard deviation: sqrt(variance + epsilon)."""

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        centred = x - _mean(x)
        share = tf.math.rsqrt(_mean(centred * centred) + epsilon)
        y = centred * share
        return y, lambda dy: share * (dy - _mean(dy) - y * _mean(dy * y))

    return run(x)


def _mean(x: Tensor) -> Tensor:
    return tf.reduce_mean(x, -1, keepdims=True)
