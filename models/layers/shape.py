"""Layers without arithmetic: they rearrange, or apply an activation alone."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers.lowering import LoweredLayer, activation_name
from models.layers.primitives import Tensor

keras = tf.keras.layers


class Rearranged(LoweredLayer):
    """Flatten and Reshape."""

    handles = (keras.Flatten, keras.Reshape)

    def check(self) -> None:
        self.refuse_unless(
            getattr(self.layer, "data_format", "channels_last") == "channels_last",
            "its data format is channels_first",
            "use channels_last",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return tf.reshape(x, [-1, *self.layer.output_shape[1:]])


class Activation(LoweredLayer):
    """An activation as its own layer; the options of ReLU that bend it are refused."""

    handles = (keras.Activation, keras.ReLU)

    def check(self) -> None:
        if isinstance(self.layer, keras.Activation):
            activation_name(self.layer)
            return
        layer = self.layer
        self.refuse_unless(
            layer.max_value is None and not layer.negative_slope and not layer.threshold,
            "it is bent by max_value, negative_slope or threshold",
            "use a plain ReLU",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.activate(x)
