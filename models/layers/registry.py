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


INSTEAD: dict[str, str] = {
    "Lambda": "say it by layers such as Add, Multiply, Rescaling, Reshape and Activation",
    "Normalization": "put means and standard deviations into SCALING, an InputSpec",
    "StringLookup": "do it in the data adapter, and give the model ids",
    "TextVectorization": "do it in the data adapter, and give the model ids",
    "Subtract": "use Rescaling(-1) and Add",
    "PReLU": "use LeakyReLU",
    "ThresholdedReLU": "use ReLU",
    "GaussianNoise": "use Dropout",
    "GaussianDropout": "use Dropout",
    "AlphaDropout": "use Dropout",
    "SpatialDropout1D": "use Dropout",
    "SpatialDropout2D": "use Dropout",
    "SimpleRNN": "use GRU or LSTM",
    "RNN": "use GRU or LSTM",
    "Bidirectional": "use a GRU or LSTM of one direction, or Conv1D",
    "TimeDistributed": "use the layer alone where it is Dense, which works along the last axis; or Conv1D",
    "Masking": "cut or pad sequences to one length in the data adapter",
    "ActivityRegularization": "leave it out: devices lower the loss alone",
    "AddLoss": "leave it out: devices lower the loss alone",
    **dict.fromkeys(
        ["RandomFlip", "RandomRotation", "RandomZoom", "RandomCrop", "RandomContrast", "RandomTranslation"],
        "change the examples in the data adapter",
    ),
}
"""By the name of a Keras layer without a form: what does its work."""


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
    supported = f"supported are {', '.join(known)}"
    instead = INSTEAD.get(type(layer).__name__)
    raise UnsupportedLayer(
        layer, "it has no builtin-only form", f"{instead}; {supported}" if instead else supported
    )
