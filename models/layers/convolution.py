"""Convolutions over one and two axes."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import Activated
from models.layers.primitives import Tensor


class _Convolution(Activated):
    def check(self) -> None:
        super().check()
        layer = self.layer
        self.refuse_unless(
            layer.data_format == "channels_last", "its data format is channels_first", "use channels_last"
        )
        self.refuse_unless(
            layer.padding in {"valid", "same"}, f"its padding is {layer.padding}", "use valid or same"
        )
        self.refuse_unless(layer.groups == 1, f"it has {layer.groups} groups", "use groups=1")
        self.refuse_unless(
            all(rate == 1 for rate in layer.dilation_rate),
            "it is dilated",
            "use a stride or pooling before it",
        )


class Conv2D(_Convolution):
    """Two-dimensional convolution with strides."""

    handles = (tf.keras.layers.Conv2D,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer = self.layer
        y = primitives.convolution(x, values[0], tuple(layer.strides), layer.padding.upper())
        return self.with_bias(y, values)


class Conv1D(_Convolution):
    """One-dimensional convolution with strides: a two-dimensional one over an image of height 1."""

    handles = (tf.keras.layers.Conv1D,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer = self.layer
        image, kernel = tf.expand_dims(x, 1), tf.expand_dims(values[0], 0)
        y = primitives.convolution(image, kernel, (1, layer.strides[0]), layer.padding.upper())
        return tf.squeeze(self.with_bias(y, values), [1])
