"""A Keras model as a chain of lowered layers over one flat parameter vector. Needs TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.layers.lowering import LoweredLayer, UnsupportedLayer
from models.layers.primitives import Tensor
from models.layers.registry import lower
from models.manifest import ParameterSpec


class UnsupportedModel(ValueError):
    """A model whose form as a whole cannot be exported."""


@dataclass(frozen=True)
class _Step:
    """Apply one layer: to which tensor, into which, with which parameters."""

    layer: LoweredLayer
    source: int
    target: int
    parameters: slice


class Network:
    """The builtin-only form of a Keras model with one input and one output of logits.

    Attributes:
        parameters: layout of the flat vector: layer by layer, each in Keras's order.
        example_shape: shape of one example.
        classes: number of logits.
    """

    def __init__(self, model: Any) -> None:
        """Lower every layer of a built Sequential or functional model.

        Raises:
            UnsupportedModel: not exactly one input and one output, or a shape that is not fixed.
            UnsupportedLayer: a layer that has no builtin-only form.
        """
        if not model.built or len(model.inputs) != 1 or len(model.outputs) != 1:
            raise UnsupportedModel(f"model {model.name!r} must be built, with one input and one output")
        self.example_shape: tuple[int, ...] = tuple(model.inputs[0].shape[1:])
        if None in self.example_shape or len(model.outputs[0].shape) != 2:
            raise UnsupportedModel(
                f"model {model.name!r} must have a fixed input shape and logits (n, classes)"
            )
        self.classes = int(model.outputs[0].shape[1])
        self._input = id(model.inputs[0])
        self._output = id(model.outputs[0])
        self._model = model
        self.parameters: list[ParameterSpec] = []
        self._steps: list[_Step] = []
        self._trace()
        if not self.parameters:
            raise UnsupportedModel(f"model {model.name!r} has no parameters to train")

    @property
    def parameter_count(self) -> int:
        """Length d of the flat vector."""
        return sum(parameter.size for parameter in self.parameters)

    def flat_weights(self) -> NDArray[np.float32]:
        """The Keras model's present weights as one float32 vector (d,), in the order of `parameters`."""
        variables = [v for layer in self._model.layers for v in layer.weights]
        return np.concatenate([np.asarray(v, np.float32).ravel() for v in variables])

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parameters in a flat vector (d,)."""
        return [
            tf.reshape(flat[parameter.offset : parameter.offset + parameter.size], parameter.shape)
            for parameter in self.parameters
        ]

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """Logits (n, classes) of scaled inputs x (n, *example_shape) under the parameters `values`."""
        tensors = {self._input: x}
        for step in self._steps:
            tensors[step.target] = step.layer.forward(values[step.parameters], tensors[step.source])
        return tensors[self._output]

    def _trace(self) -> None:
        """Follow the model's layers, which Keras keeps in an order where inputs come first."""
        offset = 0
        for layer in self._model.layers:
            if type(layer) is tf.keras.layers.InputLayer:
                continue
            lowered = lower(layer)
            nodes = layer.inbound_nodes
            if len(nodes) != 1 or len(nodes[0].keras_inputs) != 1:
                raise UnsupportedLayer(
                    layer, "it is shared or has several inputs", "use each layer once, one after another"
                )
            first = len(self.parameters)
            for variable in layer.weights:
                name = f"{layer.name}/{variable.name.rsplit('/', 1)[-1].split(':')[0]}"
                shape = tuple(variable.shape)
                self.parameters.append(ParameterSpec(name=name, shape=shape, offset=offset))
                offset += self.parameters[-1].size
            span = slice(first, len(self.parameters))
            self._steps.append(_Step(lowered, id(nodes[0].keras_inputs[0]), id(nodes[0].outputs), span))
