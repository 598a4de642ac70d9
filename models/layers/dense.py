"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import Activated
from models.layers.primitives import Tensor


class Dense(Activated):
    """`y = activation(x w + b)` for x (n, i)."""

    handles = (tf.keras.layers.Dense,)

    def check(self) -> None:
        super().check()
        self.refuse_unless(
            self.layer.input_spec.min_ndim == 2 and len(self.layer.input_shape) == 2,
            f"its input has shape {self.layer.input_shape}",
            "put a Flatten or a global pooling before it",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.with_bias(primitives.matrix_product(x, values[0]), values)
