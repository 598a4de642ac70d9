"""Convolutions over one and two axes."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.convolving import Pair, convolution, depthwise
from models.layers.lowering import Activated
from models.layers.primitives import Tensor

keras = tf.keras.layers
MAX_GROUPS = 8


class _Convolution(Activated):
    """What all have in common. One axis is treated as an image of height 1."""

    def check(self) -> None:
        super().check()
        self.need_channels_last()
        layer = self.layer
        self.refuse_unless(
            layer.padding in {"valid", "same"}, f"its padding is {layer.padding}", "use valid or same"
        )

    @property
    def flat(self) -> bool:
        """Whether there is one axis only."""
        return len(self.layer.kernel_size) == 1

    def pair(self, values: Sequence[int]) -> Pair:
        """An option for two axes."""
        return (1, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))

    def run(self, x: Tensor, w: Tensor) -> Tensor:
        """A convolution with the layer's options."""
        layer = self.layer
        if w.shape[:2] == [1, 1] and set(layer.strides) == {1}:
            return self.mix(x, w)
        padding = layer.padding.upper()
        return convolution(x, w, self.pair(layer.strides), padding, self.pair(layer.dilation_rate))

    def mix(self, x: Tensor, w: Tensor) -> Tensor:
        """A convolution with a kernel of size 1."""
        # A product where weights change; a constant kernel is laid out once for the operator, faster still.
        if self.layer.trainable:
            return primitives.linear(x, tf.reshape(w, w.shape[2:]))
        return convolution(x, w, (1, 1), "VALID")

    def run_depthwise(self, x: Tensor, w: Tensor) -> Tensor:
        """A depthwise convolution with the layer's options."""
        layer = self.layer
        # The operator has one stride for both axes; an image of height 1 has one row either way.
        stride, dilations = int(layer.strides[-1]), self.pair(layer.dilation_rate)
        return depthwise(x, w, stride, layer.padding.upper(), dilations, constant=not layer.trainable)

    def need_equal_strides(self) -> None:
        """Refuse strides that the depthwise operator does not have."""
        self.refuse_unless(
            len(set(self.layer.strides)) == 1, "its strides differ by axis", "use equal strides"
        )

    def image(self, x: Tensor) -> Tensor:
        """x as an image."""
        return tf.expand_dims(x, 1) if self.flat else x

    def kernel(self, w: Tensor) -> Tensor:
        """A kernel as one of an image."""
        return tf.expand_dims(w, 0) if self.flat else w

    def unwrapped(self, y: Tensor) -> Tensor:
        """An image as the layer's output."""
        return tf.squeeze(y, [1]) if self.flat else y


class Convolution(_Convolution):
    """Convolution with strides or dilation, over all channels or in a few groups of them."""

    handles = (keras.Conv1D, keras.Conv2D)

    def check(self) -> None:
        super().check()
        self.refuse_unless(
            self.layer.groups <= MAX_GROUPS,
            f"it has {self.layer.groups} groups",
            f"use at most {MAX_GROUPS}, or a DepthwiseConv2D",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        groups, image, kernel = self.layer.groups, self.image(x), self.kernel(values[0])
        if groups == 1:
            return self.unwrapped(self.with_bias(self.run(image, kernel), values))
        parts = zip(tf.split(image, groups, -1), tf.split(kernel, groups, -1), strict=True)
        y = primitives.concatenate([self.run(part, filters) for part, filters in parts], 3)
        return self.unwrapped(self.with_bias(y, values))


class Depthwise(_Convolution):
    """Convolution of each channel by itself."""

    handles = (keras.DepthwiseConv1D, keras.DepthwiseConv2D)

    def check(self) -> None:
        super().check()
        self.need_equal_strides()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        y = self.run_depthwise(self.image(x), self.kernel(values[0]))
        return self.unwrapped(self.with_bias(y, values))


class Separable(_Convolution):
    """A depthwise convolution and one of kernel size 1 behind it."""

    handles = (keras.SeparableConv1D, keras.SeparableConv2D)

    def check(self) -> None:
        super().check()
        self.need_equal_strides()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        y = self.run_depthwise(self.image(x), self.kernel(values[0]))
        y = self.mix(y, self.kernel(values[1]))
        return self.unwrapped(self.with_bias(y, values))
