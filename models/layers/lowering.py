"""What a Keras layer in builtin-only form is; the kinds are in the modules beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from models.layers.nonlinear import ACTIVATIONS
from models.layers.primitives import Tensor, add_bias


class UnsupportedLayer(ValueError):
    """A layer that has no builtin-only form: names the layer, the reason and the alternative."""

    def __init__(self, layer: Any, reason: str, alternative: str) -> None:
        super().__init__(f"layer {layer.name!r} ({type(layer).__name__}): {reason}; {alternative}")
        self.layer_name: str = layer.name
        self.reason = reason
        self.alternative = alternative


class LoweredLayer(ABC):
    """One Keras layer in builtin-only form.

    A new kind of layer is a subclass that lists the Keras classes it stands for, refuses what it cannot do in
    `check`, and computes `forward` from primitives; the gradient follows from theirs.
    """

    handles: ClassVar[tuple[type, ...]] = ()

    def __init__(self, layer: Any) -> None:
        """Wrap a built Keras layer.

        Raises:
            UnsupportedLayer: an option of the layer has no builtin-only form.
        """
        self.layer = layer
        self.check()

    def check(self) -> None:
        """Refuse, by `UnsupportedLayer`, options that `forward` does not honour; by default none."""
        return

    @abstractmethod
    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer's output for a batch x; `values` stand for its weights, in Keras's order.

        x is a list of tensors for a layer that joins several.
        """

    def refuse_unless(self, condition: bool, reason: str, alternative: str) -> None:
        """Raise `UnsupportedLayer` for this layer if a condition does not hold."""
        if not condition:
            raise UnsupportedLayer(self.layer, reason, alternative)

    def need_channels_last(self) -> None:
        """Refuse a layer that wants its channels first."""
        form = getattr(self.layer, "data_format", "channels_last")
        self.refuse_unless(form == "channels_last", "its data format is channels_first", "use channels_last")


def activation_name(layer: Any, attribute: str = "activation") -> str:
    """The name of a layer's activation.

    Raises:
        UnsupportedLayer: the activation has no builtin-only form.
    """
    function = getattr(layer, attribute)
    name = getattr(function, "__name__", type(function).__name__)
    if name not in ACTIVATIONS:
        raise UnsupportedLayer(
            layer, f"its activation {name} has no builtin-only form", f"use one of {', '.join(ACTIVATIONS)}"
        )
    return str(name)


class Activated(LoweredLayer):
    """A layer with an activation and, perhaps, a bias as the last of its weights."""

    def check(self) -> None:
        activation_name(self.layer)

    def with_bias(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Add the bias, if the layer has one, and activate."""
        return self.activate(add_bias(x, values[-1]) if self.layer.use_bias else x)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the layer's own activation."""
        return ACTIVATIONS[activation_name(self.layer)](x)
