"""Layers without parameters that rearrange, join, activate, or drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.layers import nonlinear, primitives
from models.layers.lowering import Activated, LoweredLayer
from models.layers.primitives import Tensor

keras = tf.keras.layers


class Rearranged(LoweredLayer):
    """Flatten and Reshape."""

    handles = (keras.Flatten, keras.Reshape)

    def check(self) -> None:
        self.need_channels_last()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return tf.reshape(x, [-1, *self.layer.compute_output_shape(x.shape)[1:]])


class Permuted(LoweredLayer):
    """Axes in another order."""

    handles = (keras.Permute,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return primitives.transpose(x, [0, *self.layer.dims])


class Padded(LoweredLayer):
    """Zeros around a sequence or an image."""

    handles = (keras.ZeroPadding1D, keras.ZeroPadding2D)

    def check(self) -> None:
        self.need_channels_last()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        padding = self.layer.padding
        axes = [padding] if isinstance(self.layer, keras.ZeroPadding1D) else padding
        return primitives.pad(x, [(0, 0), *[(int(a), int(b)) for a, b in axes], (0, 0)])


class Rescaled(LoweredLayer):
    """`x * scale + offset` by constants."""

    handles = (keras.Rescaling,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer = self.layer
        self.refuse_unless(
            isinstance(layer.scale, (int, float)) and isinstance(layer.offset, (int, float)),
            "its scale or offset is no single number",
            "put the scaling of channels into the manifest's input",
        )
        return x * float(layer.scale) + float(layer.offset)


class Activation(Activated):
    """An activation as its own layer."""

    handles = (keras.Activation,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.activate(x)


class Rectified(LoweredLayer):
    """ReLU and its relatives with their options."""

    handles = (keras.ReLU, keras.LeakyReLU, keras.ELU)

    def check(self) -> None:
        layer = self.layer
        if isinstance(layer, keras.ReLU):
            bent = layer.threshold or (layer.negative_slope and layer.max_value is not None)
            self.refuse_unless(
                not bent,
                "it has a threshold, or a slope and a cap",
                "use a ReLU with one of max_value and negative_slope",
            )
        if isinstance(layer, keras.ELU):
            self.refuse_unless(float(layer.alpha) == 1.0, f"its alpha is {layer.alpha}", "use alpha=1")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, keras.ELU):
            return nonlinear.elu(x)
        if isinstance(layer, keras.LeakyReLU):
            return nonlinear.leaky_relu(x, float(layer.alpha))
        if layer.max_value is not None:
            return nonlinear.capped_relu(x, float(layer.max_value))
        return (
            nonlinear.leaky_relu(x, float(layer.negative_slope))
            if layer.negative_slope
            else (nonlinear.relu(x))
        )


class Softmax(LoweredLayer):
    """Softmax along the last axis."""

    handles = (keras.Softmax,)

    def check(self) -> None:
        self.refuse_unless(self.layer.axis in {-1}, f"its axis is {self.layer.axis}", "use axis=-1")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return nonlinear.softmax(x)


class Merged(LoweredLayer):
    """Layers that join branches: sum, product, or one behind the other."""

    handles = (keras.Add, keras.Multiply, keras.Concatenate)

    def forward(self, values: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        ranks = {len(part.shape) for part in x}
        self.refuse_unless(
            len(ranks) == 1, "its inputs have different ranks", "put a Reshape before the smaller one"
        )
        if isinstance(self.layer, keras.Concatenate):
            axis = self.layer.axis % ranks.pop()
            self.refuse_unless(axis > 0, "it joins along the batch", "join along another axis")
            return primitives.concatenate(list(x), axis)
        join = primitives.add if isinstance(self.layer, keras.Add) else primitives.multiply
        result = x[0]
        for part in x[1:]:
            result = join(result, part)
        return result


class Dropout(LoweredLayer):
    """Dropout by a mask that the caller draws; none in inference.

    Attributes:
        rate: share of entries that are set to 0.
    """

    handles = (keras.Dropout,)

    def __init__(self, layer: Any) -> None:
        """Wrap a built Dropout layer; see `LoweredLayer`."""
        super().__init__(layer)
        self.rate = float(layer.rate)

    def check(self) -> None:
        self.refuse_unless(
            self.layer.noise_shape is None, "it has a noise_shape", "drop single entries, without noise_shape"
        )
        self.refuse_unless(0 < self.layer.rate < 1, "its rate is not between 0 and 1", "leave it out")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return x

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        """x times a mask (n, entries of one example) of 0 and 1 / (1 - rate)."""
        return primitives.multiply(x, tf.reshape(keep, x.shape))
