"""Pooling with gradients made of builtins; see `primitives` for why."""

from __future__ import annotations

import tensorflow as tf

from models.layers.convolving import Pair, Window, fitted, spaced, windows
from models.layers.primitives import Gradient, Tensor, differentiable, positive

LOWEST = -3.0e38
"""Stands for minus infinity, which tflite-runtime 2.14 does not keep."""


def average_pool(x: Tensor, size: Pair, strides: Pair | None = None, padding: str = "VALID") -> Tensor:
    """Mean over windows of x (n, h, w, c); padding has no part in a mean."""
    strides = strides or size
    axes = windows(x, size, strides, (1, 1), padding)
    simple = _touching(axes)

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.avg_pool2d(x, size, strides, padding)

        def gradient(dy: Tensor) -> Tensor:
            if simple:
                return _with_rim(_spread(dy * (1.0 / (size[0] * size[1])), size), x, axes)
            share = dy / _members(axes)
            before = tuple(axis.reach - 1 - axis.padding[0] for axis in axes)
            sizes = tuple(axis.size + axis.reach - 1 for axis in axes)
            around = fitted(spaced(share, strides), axes, before, sizes)  # type: ignore[arg-type]
            return tf.nn.avg_pool2d(around, size, 1, "VALID") * float(size[0] * size[1])

        return y, gradient

    return run(x)


def _members(axes: tuple[Window, Window]) -> Tensor:
    """How many entries of the image each window holds, shape (1, h', w', 1): a row times a column."""
    counts = []
    for axis in axes:
        starts = [index * axis.stride - axis.padding[0] for index in range(axis.count)]
        counts.append([float(min(s + axis.kernel, axis.size) - max(s, 0)) for s in starts])
    return tf.reshape(tf.constant(counts[0]), [1, -1, 1, 1]) * tf.reshape(
        tf.constant(counts[1]), [1, 1, -1, 1]
    )


def max_pool(x: Tensor, size: Pair, strides: Pair | None = None, padding: str = "VALID") -> Tensor:
    """Maximum over windows of x (n, h, w, c).

    Tied maxima of windows that touch share their gradient; of windows that overlap the first one takes it,
    along each axis. (TensorFlow gives it to the first of the window.) After a convolution ties come from
    equal patches, for which both ways give the filter the same gradient.
    """
    strides = strides or size
    axes = windows(x, size, strides, (1, 1), padding)
    if not _touching(axes):
        return _max_along(_max_along(x, 1, axes[0]), 2, axes[1])

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.max_pool2d(x, size, size, "VALID")

        def gradient(dy: Tensor) -> Tensor:
            rows, columns = (axis.count * axis.stride for axis in axes)
            inside = x[:, :rows, :columns, :] if [rows, columns] != list(x.shape[1:3]) else x
            largest = 1.0 - positive(_spread(y, size) - inside)
            ties = tf.nn.avg_pool2d(largest, size, size, "VALID") * float(size[0] * size[1])
            return _with_rim(largest * _spread(dy / ties, size), x, axes)

        return y, gradient

    return run(x)


def _max_along(x: Tensor, axis: int, window: Window) -> Tensor:
    """Maximum over windows along axis 1 or 2 of x (n, h, w, c).

    A maximum over a rectangle is a maximum over rows of maxima over columns, which takes k + k steps backward
    in place of k * k.
    """
    if window.kernel == 1 and window.stride == 1:
        return x
    size = (window.kernel, 1) if axis == 1 else (1, window.kernel)
    strides = (window.stride, 1) if axis == 1 else (1, window.stride)

    @differentiable
    def run(x: Tensor) -> tuple[Tensor, Gradient]:
        y = tf.nn.max_pool2d(x, size, strides, "SAME" if window.same else "VALID")

        def gradient(dy: Tensor) -> Tensor:
            before = window.padding[0]
            after = max(window.used - window.size - before, 0)
            outside: list[Pair] = [(0, 0)] * 4
            outside[axis] = (before, after)
            padded = tf.pad(x, outside, constant_values=LOWEST) if before or after else x
            total, left = None, None
            for tap in range(window.kernel):
                if not _inside(tap, window):
                    continue
                entries = _every(padded, axis, tap, window)
                largest = 1.0 - positive(y - entries)
                if left is not None:
                    largest = largest * left
                left = 1.0 - largest if left is None else left - largest
                place = _placed(largest * dy, axis, tap, window)
                total = place if total is None else total + place
            return total

        return y, gradient

    return run(x)


def _inside(tap: int, window: Window) -> bool:
    """Whether the entry `tap` of any window is in the image: a window may be larger than the image is."""
    first = tap - window.padding[0]
    return first < window.size and first + (window.count - 1) * window.stride >= 0


def _every(x: Tensor, axis: int, start: int, window: Window) -> Tensor:
    """The entry `start` of each window along an axis of a padded x."""
    stop = start + (window.count - 1) * window.stride + 1
    if axis == 1:
        return x[:, start : stop : window.stride]
    return x[:, :, start : stop : window.stride]


def _placed(x: Tensor, axis: int, tap: int, window: Window) -> Tensor:
    """Put gradients of the entry `tap` of each window where it is in the image."""
    x = spaced(x, (window.stride, 1) if axis == 1 else (1, window.stride))
    start = tap - window.padding[0]
    length = int(x.shape[axis])
    cut_before, cut_after = max(-start, 0), max(start + length - window.size, 0)
    if cut_before or cut_after:
        x = x[:, cut_before : length - cut_after] if axis == 1 else x[:, :, cut_before : length - cut_after]
    begin = max(start, 0)
    paddings: list[Pair] = [(0, 0)] * 4
    paddings[axis] = (begin, window.size - begin - int(x.shape[axis]))
    return tf.pad(x, paddings) if any(paddings[axis]) else x


@differentiable
def global_average(x: Tensor) -> tuple[Tensor, Gradient]:
    """Mean of x (n, h, w, c) over h and w, shape (n, c)."""
    height, width, channels = x.shape[1:]

    def gradient(dy: Tensor) -> Tensor:
        # Not by broadcasting, which converts to a product with a constant of this size.
        share = tf.reshape(dy * (1.0 / (height * width)), [-1, 1, 1, channels])
        return _spread(share, (height, width))

    return tf.reduce_mean(x, [1, 2]), gradient


@differentiable
def global_max(x: Tensor) -> tuple[Tensor, Gradient]:
    """Maximum of x (n, h, w, c) over h and w, shape (n, c); ties share the gradient, as in TensorFlow."""
    y = tf.reduce_max(x, [1, 2], keepdims=True)

    def gradient(dy: Tensor) -> Tensor:
        largest = 1.0 - positive(y - x)
        share = tf.reshape(dy, [-1, 1, 1, x.shape[3]]) / tf.reduce_sum(largest, [1, 2], keepdims=True)
        return largest * share

    return tf.reshape(y, [-1, x.shape[3]]), gradient


def _touching(axes: tuple[Window, Window]) -> bool:
    """Whether windows neither overlap nor leave gaps nor need padding."""
    return all(axis.stride == axis.kernel and not axis.same for axis in axes)


def _spread(x: Tensor, size: Pair) -> Tensor:
    """Repeat every pixel of x (n, h, w, c) over a block of `size`."""
    if size == (1, 1):
        return x
    return tf.image.resize(x, [x.shape[1] * size[0], x.shape[2] * size[1]], "nearest")


def _with_rim(inside: Tensor, x: Tensor, axes: tuple[Window, Window]) -> Tensor:
    """Add zeros for the rows and columns at the end of x that fill no window."""
    rest = [axis.size - axis.count * axis.stride for axis in axes]
    return tf.pad(inside, [(0, 0), (0, rest[0]), (0, rest[1]), (0, 0)]) if any(rest) else inside
