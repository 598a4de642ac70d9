"""What a Keras layer in builtin-only form is; the kinds are in the modules beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from models.layers import primitives
from models.layers.primitives import Tensor


class UnsupportedLayer(ValueError):
    """A layer that has no builtin-only form: names the layer, the reason and the alternative."""

    def __init__(self, layer: Any, reason: str, alternative: str) -> None:
        super().__init__(f"layer {layer.name!r} ({type(layer).__name__}): {reason}; {alternative}")
        self.layer_name: str = layer.name
        self.reason = reason
        self.alternative = alternative


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": primitives.relu,
}


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
        if layer.weights and not layer.trainable:
            raise UnsupportedLayer(layer, "it is frozen", "set trainable = True or leave the layer out")
        self.check()

    def check(self) -> None:
        """Refuse, by `UnsupportedLayer`, options that `forward` does not honour; by default none."""
        return

    @abstractmethod
    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer's output for a batch x; `values` stand for its weights, in Keras's order."""

    def refuse_unless(self, condition: bool, reason: str, alternative: str) -> None:
        """Raise `UnsupportedLayer` for this layer if a condition does not hold."""
        if not condition:
            raise UnsupportedLayer(self.layer, reason, alternative)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the layer's own activation; a layer that has none but stands for one is a ReLU."""
        return ACTIVATIONS[activation_name(self.layer) if hasattr(self.layer, "activation") else "relu"](x)


def activation_name(layer: Any) -> str:
    """The name of a layer's activation.

    Raises:
        UnsupportedLayer: the activation has no builtin-only form, or does not belong into the model.
    """
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if name == "softmax":
        raise UnsupportedLayer(
            layer,
            "its softmax is already part of the loss",
            "remove it: the last layer gives logits, and predictions are made probabilities on the device",
        )
    if name not in ACTIVATIONS:
        raise UnsupportedLayer(
            layer, f"its activation {name} has no builtin-only form", f"use one of {', '.join(ACTIVATIONS)}"
        )
    return str(name)


class Activated(LoweredLayer):
    """A layer with an activation and, perhaps, a bias."""

    def check(self) -> None:
        activation_name(self.layer)

    def with_bias(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Add the bias, if the layer has one, and activate."""
        return self.activate(primitives.add_bias(x, values[1]) if self.layer.use_bias else x)
