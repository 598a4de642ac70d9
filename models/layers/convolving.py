"""Convolutions with gradients made of builtins; see `primitives` for why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from models.layers.primitives import Gradient, Tensor, differentiable

Pair = tuple[int, int]
MAX_TAPS = 25
"""Entries of a depthwise filter up to which it is written out entry by entry."""


@dataclass(frozen=True)
class Window:
    """How a window moves along one axis.

    Attributes:
        size: length of the axis.
        kernel: entries in the window.
        stride: entries that it moves by.
        dilation: distance of its entries.
        same: whether the axis is padded so that every stride-th entry gets a window.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    same: bool

    @property
    def reach(self) -> int:
        """Entries that the window spans."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def count(self) -> int:
        """Number of windows."""
        return -(-self.size // self.stride) if self.same else (self.size - self.reach) // self.stride + 1

    @property
    def used(self) -> int:
        """Entries of the padded axis that some window spans."""
        return (self.count - 1) * self.stride + self.reach

    @property
    def padding(self) -> Pair:
        """Entries to add before and after."""
        total = max(self.used - self.size, 0) if self.same else 0
        return total // 2, total - total // 2


def windows(x: Tensor, kernel: Pair, strides: Pair, dilations: Pair, padding: str) -> tuple[Window, Window]:
    """The windows along both axes of x (n, h, w, c)."""
    first, second = (
        Window(int(size), int(length), stride, dilation, padding == "SAME")
        for size, length, stride, dilation in zip(x.shape[1:3], kernel, strides, dilations, strict=True)
    )
    return first, second


def used_part(x: Tensor, axes: tuple[Window, Window]) -> Tensor:
    """x (n, h, w, c) with its padding, without the rim that no window reaches."""
    pads = [axis.padding for axis in axes]
    padded = tf.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x
    used = [axis.used for axis in axes]
    return padded[:, : used[0], : used[1], :] if list(padded.shape[1:3]) != used else padded


def spaced(x: Tensor, strides: Pair) -> Tensor:
    """x (n, h, w, c) with zeros between its pixels: `stride` entries for each one, its own first."""
    for axis, stride in ((1, strides[0]), (2, strides[1])):
        if stride > 1:
            n, h, w, c = x.shape
            # In four axes, the most that padding is fast for.
            split = [n, h, 1, w * c] if axis == 1 else [n * h, w, 1, c]
            zeros = tf.pad(tf.reshape(x, split), [(0, 0), (0, 0), (0, stride - 1), (0, 0)])
            x = tf.reshape(zeros, [n, h * stride, w, c] if axis == 1 else [n, h, w * stride, c])
    return x


def fitted(x: Tensor, axes: tuple[Window, Window], before: Pair, sizes: Pair) -> Tensor:
    """`spaced` output gradients x at offset `before` of an image of `sizes`; what is beyond is cut off.

    The zeros after the last pixel may reach beyond the image, never a pixel.
    """
    heights = [axis.count * axis.stride for axis in axes]
    keep = [min(height, size - start) for height, size, start in zip(heights, sizes, before, strict=True)]
    if keep != heights:
        x = x[:, : keep[0], : keep[1], :]
    pads = [(start, size - start - length) for start, size, length in zip(before, sizes, keep, strict=True)]
    return tf.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x


def _flipped(w: Tensor) -> Tensor:
    """A kernel (kh, kw, ...) mirrored along both its axes, one after the other as the runtimes need it."""
    for axis in (0, 1):
        w = tf.reverse(w, [axis]) if w.shape[axis] > 1 else w
    return w


def _full(dy: Tensor, axes: tuple[Window, Window]) -> Tensor:
    """Output gradients with zeros between and around, so that a mirrored kernel gives input gradients."""
    before = tuple(axis.reach - 1 - axis.padding[0] for axis in axes)
    sizes = tuple(axis.size + axis.reach - 1 for axis in axes)
    # A kernel narrower than its stride with padding cannot start left of the image.
    return fitted(spaced(dy, (axes[0].stride, axes[1].stride)), axes, before, sizes)  # type: ignore[arg-type]


def _centred(axes: tuple[Window, Window]) -> bool:
    """Whether as much is padded before as after, so that padding serves the gradient as well."""
    return all(axis.same and 2 * axis.padding[0] == axis.reach - 1 for axis in axes)


def convolution(x: Tensor, w: Tensor, strides: Pair, padding: str, dilations: Pair = (1, 1)) -> Tensor:
    """Two-dimensional convolution of x (n, h, w, i) with w (kh, kw, i, o); padding `VALID` or `SAME`.

    The gradient by the filter is itself a convolution, with the channels of x as its batch, the batch as its
    channels, the strides as its dilation and the dilation as its strides: dw[p, q, i, o] = sum over n, r, s
    of x[n, r*sh + p*dh, s*sw + q*dw, i] dy[n, r, s, o]. The gradient by the input is the transposed
    convolution; where the kernel is dilated, which that operator cannot be, it is a convolution with the
    mirrored kernel.
    """
    axes = windows(x, w.shape[:2], strides, dilations, padding)

    @differentiable
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            if dilations == (1, 1):
                dx = tf.nn.conv2d_transpose(dy, w, x.shape, strides, padding)
            else:
                mirrored = tf.transpose(_flipped(w), [0, 1, 3, 2])
                dx = tf.nn.conv2d(_full(dy, axes), mirrored, 1, "VALID", dilations=dilations)
            # Padded when the batch is last: padding single channels takes ten times as long.
            images = used_part(tf.transpose(x, [3, 1, 2, 0]), axes)
            filters = tf.transpose(dy, [1, 2, 0, 3])
            dw = tf.nn.conv2d(images, filters, dilations, "VALID", dilations=strides)
            return dx, tf.transpose(dw, [1, 2, 0, 3])

        return tf.nn.conv2d(x, w, strides, padding, dilations=dilations), gradient

    return run(x, w)


def depthwise(
    x: Tensor, w: Tensor, stride: int, padding: str, dilations: Pair = (1, 1), *, constant: bool = False
) -> Tensor:
    """Each channel of x (n, h, w, c) by its own m filters w (kh, kw, c, m): shape (n, h', w', c m).

    A small filter that changes is a sum of shifted products, see `_shifted`. Large ones, those with several
    filters a channel, and a `constant` one, which the runtimes lay out once, are left to the operator: its
    gradient by the input is a depthwise convolution with the mirrored kernel, and that by the filter as well:
    every channel of every image is a channel, the output gradients are its kernel, and the images are added
    up at the end.
    """
    axes = windows(x, w.shape[:2], (stride, stride), dilations, padding)
    channels, times = int(w.shape[2]), int(w.shape[3])
    if times == 1 and axes[0].kernel * axes[1].kernel <= MAX_TAPS and not constant:
        return _shifted(x, w, axes)

    @differentiable
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            count = dy.shape[0]
            mirrored = tf.reshape(_flipped(w), [*w.shape[:2], channels * times, 1])
            around, rim = (dy, "SAME") if stride == 1 and _centred(axes) else (_full(dy, axes), "VALID")
            dx = _depthwise(around, mirrored, 1, rim, dilations)
            if times > 1:
                dx = tf.reduce_sum(tf.reshape(dx, [-1, channels, times]), 2)
            inside = (axes[0].used - axes[0].reach + 1, axes[1].used - axes[1].reach + 1)
            kernel = fitted(spaced(dy, (stride, stride)), axes, (0, 0), inside)
            images = tf.transpose(used_part(x, axes), [1, 2, 0, 3])
            images = tf.reshape(images, [1, *images.shape[:2], count * channels])
            kernel = tf.reshape(tf.transpose(kernel, [1, 2, 0, 3]), [*inside, count * channels, times])
            each = _taps(images, kernel, dilations)
            each = tf.reshape(each, [w.shape[0] * w.shape[1], count, channels * times])
            return tf.reshape(dx, x.shape), tf.reshape(tf.reduce_sum(each, 1), w.shape)

        return _depthwise(x, w, stride, padding, dilations), gradient

    return run(x, w)


def _shifted(x: Tensor, w: Tensor, axes: tuple[Window, Window]) -> Tensor:
    """Depthwise convolution by one filter w (kh, kw, c, 1) a channel: shifted images times its entries.

    The gradient by the input is such a sum of output gradients; where the stride is 1, the shifted ones also
    give that by the filter. A batch of known size is one image for this, see `_joined`: three quarters of the
    time, as what is shifted and what is multiplied by an entry then lies in long runs.
    """
    taps, channels = axes[0].kernel * axes[1].kernel, int(w.shape[2])
    batch = x.shape[0] or 1
    first, second = (
        Window(axis.size + axis.reach - 1, axis.kernel, 1, axis.dilation, False) for axis in axes
    )

    @differentiable
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Gradient]:
        rows = tf.reshape(w, [taps, channels])
        if batch > 1:
            rows = tf.reshape(tf.expand_dims(rows, 1) * tf.ones([batch, 1]), [taps, batch * channels])
        filters, image = tf.unstack(rows), _joined(x)

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            dy = _joined(dy)
            # From the last entry to the first, as the kernel is mirrored.
            shifts = _shifts(_full(dy, axes), (first, second))[::-1]
            if axes[0].stride == 1:
                dw = _products_summed(shifts, image, channels)
            else:
                dw = _products_summed(_shifts(used_part(image, axes), axes), dy, channels)
            return _parted(_weighted(shifts, filters), batch), tf.reshape(dw, w.shape)

        return _parted(_weighted(_shifts(used_part(image, axes), axes), filters), batch), gradient

    return run(x, w)


def _joined(x: Tensor) -> Tensor:
    """The images x (n, h, w, c) side by side in one of many channels: (1, h, w, n c); one alone, or an
    unknown number of them, as they are.
    """
    n, h, w, c = x.shape
    if n in (None, 1):
        return x
    return tf.reshape(tf.transpose(tf.reshape(x, [n, h * w, c]), [1, 0, 2]), [1, h, w, n * c])


def _parted(x: Tensor, batch: int) -> Tensor:
    """What `_joined` joined, as images again."""
    if batch == 1:
        return x
    _, h, w, width = x.shape
    parts = tf.transpose(tf.reshape(x, [h * w, batch, width // batch]), [1, 0, 2])
    return tf.reshape(parts, [batch, h, w, width // batch])


def _shifts(padded: Tensor, axes: tuple[Window, Window]) -> list[Tensor]:
    """For each entry of a kernel, row by row, what it meets in an image with its padding: (n, h', w', c)."""
    first, second = axes
    parts = []
    for row in range(first.kernel):
        for column in range(second.kernel):
            top, left = row * first.dilation, column * second.dilation
            parts.append(
                padded[
                    :,
                    top : top + (first.count - 1) * first.stride + 1 : first.stride,
                    left : left + (second.count - 1) * second.stride + 1 : second.stride,
                    :,
                ]
            )
    return parts


def _weighted(parts: Sequence[Tensor], filters: Sequence[Tensor]) -> Tensor:
    """The sum of images (n, h, w, c), each times its own factors (c,)."""
    total = parts[0] * filters[0]
    for part, factors in zip(parts[1:], filters[1:], strict=True):
        total = total + part * factors
    return total


def _products_summed(parts: Sequence[Tensor], other: Tensor, channels: int) -> Tensor:
    """For each of k images the sum of its product with another one, for each channel of all joined: (k, c).

    The sum over an image is a mean by pooling, which is twice as fast as a sum over axes.
    """
    height, width = other.shape[1:3]
    means = [tf.nn.avg_pool2d(part * other, (height, width), 1, "VALID") for part in parts]
    joined = tf.concat(means, 1) if len(means) > 1 else means[0]
    each = tf.reshape(joined, [-1, len(parts), other.shape[3] // channels, channels])
    return tf.reduce_sum(each, [0, 2]) * float(height * width)


def _taps(images: Tensor, kernel: Tensor, strides: Pair) -> Tensor:
    """One depthwise convolution; the operator's strides are equal, so unequal ones take 1 and thin out."""
    if strides[0] == strides[1]:
        return tf.nn.depthwise_conv2d(images, kernel, [1, *strides, 1], "VALID")
    each = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
    return each[:, :: strides[0], :: strides[1], :]


def _depthwise(x: Tensor, w: Tensor, stride: int, padding: str, dilations: Pair) -> Tensor:
    return tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding, dilations=dilations)
