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


_NEVER_HONOURED = {
    "_regularizer": "leave it out: devices lower the loss alone (Dropout and a round's clip norm hold back)",
    "_constraint": "leave it out: an update is added to the weights as it is",
}
"""Endings of options that every kind of layer may have, and what to do instead."""


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
        self._refuse_what_no_layer_honours()
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

    def _refuse_what_no_layer_honours(self) -> None:
        """Refuse options of Keras that would change training, or its precision, and are in no graph."""
        layer = self.layer
        self.refuse_unless(
            layer.compute_dtype not in {"float16", "bfloat16"},
            f"it computes in {layer.compute_dtype}",
            "build the model under tf.keras.mixed_precision.set_global_policy('float32')",
        )
        given = [name for name, value in layer.get_config().items() if value is not None]
        for ending, instead in _NEVER_HONOURED.items():
            # What is fixed is moved by neither; its activities still depend on the layers before it.
            odd = [n for n in given if n.endswith(ending) and (layer.trainable or n.startswith("activity"))]
            self.refuse_unless(not odd, f"its {' and '.join(odd)} would not train", instead)

    def input_shape(self) -> tuple[int | None, ...]:
        """The shape that reaches the layer, with None for the examples; refuses a layer that gets several."""
        try:
            shape = self.layer.input_shape
        except AttributeError:
            shape = None
        self.refuse_unless(
            isinstance(shape, tuple), "it gets inputs of several shapes", "use a layer of its own for each"
        )
        return tuple(shape)

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
    if name in ACTIVATIONS and not function.__module__.startswith(("keras.", "tensorflow.")):
        raise UnsupportedLayer(
            layer, f"its activation {name} is a function of {function.__module__}", "use Keras's of that name"
        )
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
