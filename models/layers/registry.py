"""Which class stands for which Keras layer. A new kind of layer is one class and one entry here."""

from __future__ import annotations

from typing import Any

from models.layers.convolution import Conv1D, Conv2D
from models.layers.dense import Dense
from models.layers.lowering import LoweredLayer, UnsupportedLayer
from models.layers.pooling import GlobalAverage, GlobalMax, Pooling
from models.layers.shape import Activation, Rearranged

LAYERS: tuple[type[LoweredLayer], ...] = (
    Dense,
    Conv1D,
    Conv2D,
    Pooling,
    GlobalAverage,
    GlobalMax,
    Rearranged,
    Activation,
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
    known = sorted({handled.__name__ for kind in LAYERS for handled in kind.handles})
    raise UnsupportedLayer(layer, "it has no builtin-only form", f"supported are {', '.join(known)}")
