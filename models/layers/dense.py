"""Fully connected layers, embeddings and attention: products with matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import Activated, LoweredLayer
from models.layers.nonlinear import softmax
from models.layers.primitives import Tensor

keras = tf.keras.layers


class Dense(Activated):
    """`y = activation(x w + b)` for x (..., i), along its last axis."""

    handles = (keras.Dense,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.with_bias(primitives.linear(x, values[0]), values)


class Embedding(LoweredLayer):
    """A learnt vector for each of a fixed number of ids; x (n, t) holds ids as float32."""

    handles = (keras.Embedding,)

    def check(self) -> None:
        self.refuse_unless(
            not self.layer.mask_zero,
            "it masks id 0",
            "use mask_zero=False and pool over the padding, or cut sequences to one length",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return primitives.look_up(tf.cast(x, tf.int32), values[0])


class Attention(LoweredLayer):
    """Multi-head self-attention over x (n, t, d) (Vaswani et al. 2017, arXiv 1706.03762, section 3.2)."""

    handles = (keras.MultiHeadAttention,)

    def check(self) -> None:
        layer = self.layer
        self.refuse_unless(
            not layer._dropout, "it has dropout", "use dropout=0 and a Dropout layer behind it"
        )
        self.refuse_unless(
            layer._key_dim == layer._value_dim and layer._use_bias,
            "its keys and values differ in size, or it has no bias",
            "use value_dim=None and use_bias=True",
        )
        self.refuse_unless(
            layer._output_shape is None, "it has an output_shape", "put a Dense layer behind it"
        )

    def forward(self, values: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        first = x[0]
        self.refuse_unless(
            all(other is first for other in x) and first.shape.rank == 3,
            "its queries, keys and values are not one sequence",
            "call it as layer(x, x) on (n, t, d)",
        )
        layer, (length, width) = self.layer, first.shape[1:]
        heads, size = layer._num_heads, layer._key_dim

        def heads_of(kernel: Tensor, bias: Tensor) -> Tensor:
            flat = primitives.linear(first, tf.reshape(kernel, [width, heads * size]))
            flat = primitives.add_bias(flat, tf.reshape(bias, [heads * size]))
            return tf.reshape(flat, [-1, length, heads, size])

        query, key, value = (heads_of(values[i], values[i + 1]) for i in (0, 2, 4))
        scores = primitives.batch_product(
            primitives.transpose(query * (1.0 / math.sqrt(size)), [0, 2, 1, 3]),
            primitives.transpose(key, [0, 2, 3, 1]),
        )
        mixed = primitives.batch_product(softmax(scores), primitives.transpose(value, [0, 2, 1, 3]))
        joined = tf.reshape(primitives.transpose(mixed, [0, 2, 1, 3]), [-1, length, heads * size])
        out = primitives.linear(joined, tf.reshape(values[6], [heads * size, width]))
        return primitives.add_bias(out, values[7])
