"""Which class stands for which Keras layer. A new kind of layer is one class and one entry here."""

from __future__ import annotations

from typing import Any

from models.layers.convolution import Convolution, Depthwise, Separable
from models.layers.dense import Attention, Dense, Embedding
from models.layers.lowering import LoweredLayer, UnsupportedLayer
from models.layers.normalisation import FrozenBatchNormalisation, GroupNormalisation, LayerNormalisation
from models.layers.pooling import GlobalPooling, Pooling
from models.layers.recurrent import Gru, Lstm
from models.layers.shape import (
    Activation,
    Dropout,
    Merged,
    Padded,
    Permuted,
    Rearranged,
    Rectified,
    Rescaled,
    Softmax,
)

LAYERS: tuple[type[LoweredLayer], ...] = (
    Dense,
    Embedding,
    Attention,
    Convolution,
    Depthwise,
    Separable,
    Pooling,
    GlobalPooling,
    Gru,
    Lstm,
    FrozenBatchNormalisation,
    LayerNormalisation,
    GroupNormalisation,
    Rearranged,
    Permuted,
    Padded,
    Rescaled,
    Activation,
    Rectified,
    Softmax,
    Merged,
    Dropout,
)


def lower(layer: Any) -> LoweredLayer:
    """The builtin-only form of a built Keras layer.

    Raises:
        UnsupportedLayer: no form for this class, or for an option of this layer.
    """
    for kind in LAYERS:
        # By exact class: a subclass may compute something else.
        if type(layer) in kind.handles:
            return kind(layer)
    if type(layer).__name__ in {"TFOpLambda", "SlicingOpLambda"}:
        raise UnsupportedLayer(
            layer, "it is a bare TensorFlow operation", "use a layer, such as Add, Multiply or Reshape"
        )
    known = sorted({handled.__name__ for kind in LAYERS for handled in kind.handles})
    raise UnsupportedLayer(layer, "it has no builtin-only form", f"supported are {', '.join(known)}")
