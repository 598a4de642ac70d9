"""Differentiable operations whose forward *and* backward forms convert to TensorFlow Lite builtins.

TensorFlow's own gradients of these operations (`ReluGrad`, `Conv2DBackpropFilter`, `MaxPoolGrad` ...) have no
builtin form and would need the Flex delegate, which the small runtimes lack (tensorflow/tensorflow#54244).
Each function here carries its gradient, so that a layer only composes functions and `tf.GradientTape` does
the rest; operations whose stock gradient is made of builtins (reshape, add, multiply ...) need no entry.

Two rules keep the file small and the result right. Never make a constant of the size of an activation or of a
parameter (`zeros_like` of a static shape is folded into the file). Never use `tf.matmul` or `x @ w` with a
weight that is a variable: the converter first makes it a fully connected operation, fuses the activation that
follows, then rewrites it as a batch matrix product and *loses* the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import tensorflow as tf

Gradient = Callable[..., Any]
Tensor = Any
"""A `tf.Tensor`; TensorFlow ships no types that mypy reads."""


def _differentiable(function: Callable[..., tuple[Tensor, Gradient]]) -> Callable[..., Tensor]:
    """A function that returns its result and its gradient, as one that `tf.GradientTape` understands."""
    return cast("Callable[..., Tensor]", tf.custom_gradient(function))


@_differentiable
def relu(x: Tensor) -> tuple[Tensor, Gradient]:
    """Rectified linear unit; the gradient at 0 is 0, as in TensorFlow."""
    y = tf.nn.relu(x)
    return y, lambda dy: dy * _positive(y)


@_differentiable
def add_bias(x: Tensor, bias: Tensor) -> tuple[Tensor, Gradient]:
    """Add a bias (c,) to the last axis of x (..., c)."""
    axes = list(range(x.shape.rank - 1))
    return x + bias, lambda dy: (dy, tf.reduce_sum(dy, axes))


@_differentiable
def matrix_product(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
    """x (n, i) times w (i, o)."""

    def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
        return _product(dy, w, right=True), _product(x, dy, left=True)

    return _product(x, w), gradient


def _product(x: Tensor, y: Tensor, *, left: bool = False, right: bool = False) -> Tensor:
    return tf.raw_ops.BatchMatMulV2(x=x, y=y, adj_x=left, adj_y=right)


def convolution(x: Tensor, w: Tensor, strides: tuple[int, int], padding: str) -> Tensor:
    """Two-dimensional convolution of x (n, h, w, i) with w (kh, kw, i, o); padding `VALID` or `SAME`.

    The gradient by the filter is itself a convolution, with the channels of x as its batch, the batch as its
    channels, and the strides as its dilation: dw[p, q, i, o] = sum over n, r, s of x[n, r*sh + p, s*sw + q,
    i] dy[n, r, s, o]. The gradient by the input is the transposed convolution.
    """
    height, width = x.shape[1:3]
    kernel = w.shape[:2]
    out = [_output_size(*sizes, padding) for sizes in zip((height, width), kernel, strides, strict=True)]
    pads = [_padding(*sizes, padding) for sizes in zip((height, width), kernel, strides, out, strict=True)]

    @_differentiable
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            dx = tf.nn.conv2d_transpose(dy, w, x.shape, strides, padding)
            # Only what the filter ever touched: a strided convolution may leave a rim that it never reads.
            used = [(o - 1) * s + k for o, s, k in zip(out, strides, kernel, strict=True)]
            padded = tf.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x
            padded = padded[:, : used[0], : used[1], :] if padded.shape[1:3] != used else padded
            images = tf.transpose(padded, [3, 1, 2, 0])
            filters = tf.transpose(dy, [1, 2, 0, 3])
            dw = tf.nn.conv2d(images, filters, 1, "VALID", dilations=strides)
            return dx, tf.transpose(dw, [1, 2, 0, 3])

        return tf.nn.conv2d(x, w, strides, padding), gradient

    return run(x, w)


def _output_size(size: int, kernel: int, stride: int, padding: str) -> int:
    return -(-size // stride) if padding == "SAME" else (size - kernel) // stride + 1


def _padding(size: int, kernel: int, stride: int, out: int, padding: str) -> tuple[int, int]:
    total = max((out - 1) * stride + kernel - size, 0) if padding == "SAME" else 0
    return total // 2, total - total // 2


def average_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over non-overlapping windows of x (n, h, w, c); a rim that fills no window is left out."""
    rim = _rim(x, size)

    @_differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.avg_pool2d(x, size, size, "VALID")
        return y, lambda dy: _with_rim(_spread(dy * (1.0 / (size[0] * size[1])), size), rim)

    return run(x)


def max_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maximum over non-overlapping windows of x (n, h, w, c); a rim that fills no window is left out.

    Tied maxima of a window share its gradient (TensorFlow gives it to the first). After a convolution ties
    come from equal patches, for which both ways give the filter the same gradient.
    """
    rim = _rim(x, size)

    @_differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.max_pool2d(x, size, size, "VALID")

        def gradient(dy: Tensor) -> Tensor:
            inside = x[:, : y.shape[1] * size[0], : y.shape[2] * size[1], :] if rim else x
            largest = 1.0 - _positive(_spread(y, size) - inside)
            ties = tf.nn.avg_pool2d(largest, size, size, "VALID") * float(size[0] * size[1])
            return _with_rim(largest * _spread(dy / ties, size), rim)

        return y, gradient

    return run(x)


@_differentiable
def global_average(x: Tensor) -> tuple[Tensor, Gradient]:
    """Mean of x (n, h, w, c) over h and w, shape (n, c)."""
    height, width, channels = x.shape[1:]

    def gradient(dy: Tensor) -> Tensor:
        share = tf.reshape(dy * (1.0 / (height * width)), [-1, 1, 1, channels])
        return tf.broadcast_to(share, x.shape)

    return tf.reduce_mean(x, [1, 2]), gradient


@_differentiable
def global_max(x: Tensor) -> tuple[Tensor, Gradient]:
    """Maximum of x (n, h, w, c) over h and w, shape (n, c); ties share the gradient, as in TensorFlow."""
    y = tf.reduce_max(x, [1, 2], keepdims=True)

    def gradient(dy: Tensor) -> Tensor:
        largest = 1.0 - _positive(y - x)
        share = tf.reshape(dy, [-1, 1, 1, x.shape[3]]) / tf.reduce_sum(largest, [1, 2], keepdims=True)
        return largest * share

    return tf.reshape(y, [-1, x.shape[3]]), gradient


def _positive(x: Tensor) -> Tensor:
    """1 where x >= 0 is over 0, else 0.

    By the sign, since comparing, casting and selecting are ten times slower in the small runtimes.
    """
    return tf.sign(x)


def _spread(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat every pixel of x (n, h, w, c) over a block of `size`."""
    if size == (1, 1):
        return x
    return tf.image.resize(x, [x.shape[1] * size[0], x.shape[2] * size[1]], "nearest")


def _rim(x: Tensor, size: tuple[int, int]) -> list[tuple[int, int]]:
    """How many rows and columns at the end fill no window, as paddings; empty if there are none."""
    rest = [length % window for length, window in zip(x.shape[1:3], size, strict=True)]
    return [(0, 0), (0, rest[0]), (0, rest[1]), (0, 0)] if any(rest) else []


def _with_rim(x: Tensor, rim: list[tuple[int, int]]) -> Tensor:
    return tf.pad(x, rim) if rim else x


def sparse_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean softmax cross-entropy of logits (n, k) under int32 labels (n,), weighted by mask (n,); a scalar.

    An example with weight 0 has no part in the loss or the gradient, so a padded batch is exact.
    """
    share = mask / tf.reduce_sum(mask)

    @_differentiable
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
