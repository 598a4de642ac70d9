"""A Keras model as lowered layers over one flat parameter vector. Needs TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.layers.dense import Embedding
from models.layers.lowering import LoweredLayer, UnsupportedLayer
from models.layers.primitives import Tensor
from models.layers.registry import lower
from models.layers.shape import Dropout, Rearranged
from models.manifest import FLOAT32_BYTES, MAX_GRAPH_BYTES, MAX_PARAMETERS, ParameterSpec


class UnsupportedModel(ValueError):
    """A model whose form as a whole cannot be exported."""


@dataclass(frozen=True)
class _Step:
    """Apply one layer: to which tensors, into which."""

    layer: LoweredLayer
    sources: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class _Rename:
    """A tensor of an outer model is also one of a model inside it, or the other way round."""

    source: int
    target: int


class Network:
    """The builtin-only form of a Keras model with one input and one output of logits.

    Attributes:
        parameters: layout of the flat vector: layer by layer, each in Keras's order; trainable weights only,
            those of local layers last.
        shared_count: elements of the flat vector before the first of a local layer.
        variables: the Keras variables behind `parameters`.
        example_shape: shape of one example.
        classes: number of logits.
        dropouts: (entries of one example, rate) of each Dropout layer, in the order of use.
        vocabulary: one over the largest id that an Embedding at the input takes; None for other inputs.
        layer_count: layers, without inputs and models around layers.
        frozen_count: weights that are constants of the graph.
    """

    def __init__(self, model: Any, local_layers: Sequence[str] = ()) -> None:
        """Lower every layer of a built Sequential or functional model.

        Args:
            model: built Keras model.
            local_layers: names of the layers, or of models used as layers, whose weights stay on a device.

        Raises:
            UnsupportedModel: see `check_form`; a local layer that is not there or has nothing to train, or
                none that is shared; an input of another type than devices give.
            UnsupportedLayer: a layer that has no builtin-only form.
        """
        check_form(model)
        self.example_shape: tuple[int, ...] = tuple(model.inputs[0].shape[1:])
        self.classes = int(model.outputs[0].shape[1])
        self._input = id(model.inputs[0])
        self._output = id(model.outputs[0])
        self.parameters: list[ParameterSpec] = []
        self.variables: list[Any] = []
        self.dropouts: list[tuple[int, float]] = []
        self.vocabulary: int | None = None
        self._lowered: dict[int, LoweredLayer] = {}
        # For each layer: where its weights are, as an index into the parameters or as a constant.
        self._weights: dict[int, list[int | NDArray[np.float32]]] = {}
        self._steps: list[_Step | _Rename] = []
        local = _named_leaves(model, local_layers)
        leaves = list(_leaves(model))
        for layer in leaves:
            if id(layer) not in local:
                self._add(layer)
        self.shared_count = self.parameter_count
        for layer in leaves:
            if id(layer) in local:
                self._add(layer)
        self._trace(model)
        if not self.shared_count:
            raise UnsupportedModel(f"model {model.name!r} has no parameters to train and share")
        # Some refusals need the shapes that reach a layer.
        self.forward(self.split(tf.zeros([self.parameter_count])), tf.zeros([1, *self.example_shape]))
        if self.vocabulary is None and not model.inputs[0].dtype.is_floating:
            raise UnsupportedModel(
                f"model {model.name!r} takes {model.inputs[0].dtype.name}, but devices give it float32: "
                "leave the dtype of Input out"
            )
        self.layer_count = len(self._lowered)
        self.frozen_count = sum(
            int(weight.size)
            for weights in self._weights.values()
            for weight in weights
            if not isinstance(weight, int)
        )

    @property
    def parameter_count(self) -> int:
        """Length d of the flat vector."""
        return sum(parameter.size for parameter in self.parameters)

    def flat_weights(self) -> NDArray[np.float32]:
        """The Keras model's present trainable weights as one float32 vector (d,), as in `parameters`."""
        return np.concatenate([np.asarray(v, np.float32).ravel() for v in self.variables])

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parameters in a flat vector (d,)."""
        return [
            tf.reshape(flat[parameter.offset : parameter.offset + parameter.size], parameter.shape)
            for parameter in self.parameters
        ]

    def forward(self, values: Sequence[Tensor], x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (n, classes) of scaled inputs x (n, *example_shape) under the parameters `values`.

        Args:
            values: trainable parameters, in the order of `parameters`.
            x: scaled inputs.
            keep: the masks of all dropouts side by side, (n, sum of their entries); None for inference.
        """
        sizes = [size for size, _ in self.dropouts]
        masks = iter(tf.split(keep, sizes, 1) if keep is not None and len(sizes) > 1 else [keep])
        tensors = {self._input: x}
        for step in self._steps:
            if isinstance(step, _Rename):
                tensors[step.target] = tensors[step.source]
                continue
            sources = [tensors[source] for source in step.sources]
            weights = [
                values[weight] if isinstance(weight, int) else tf.constant(weight)
                for weight in self._weights[id(step.layer.layer)]
            ]
            if keep is not None and isinstance(step.layer, Dropout):
                result = step.layer.drop(sources[0], next(masks))
            else:
                result = step.layer.forward(weights, sources[0] if len(sources) == 1 else sources)
            tensors[step.target] = result
        return tensors[self._output]

    def _add(self, layer: Any) -> None:
        """Lower a layer and lay out its weights; a layer that occurs again keeps its place."""
        if id(layer) in self._lowered:
            return
        self._lowered[id(layer)] = lower(layer)
        trainable = {id(variable) for variable in layer.trainable_weights}
        places: list[int | NDArray[np.float32]] = []
        for variable in layer.weights:
            if id(variable) not in trainable:
                places.append(_finite(layer, variable))
                continue
            _finite(layer, variable)
            places.append(len(self.parameters))
            name, shape = _parameter_name(layer, variable), tuple(variable.shape)
            if any(name == parameter.name for parameter in self.parameters):
                raise UnsupportedLayer(
                    layer, f"another layer has a weight {name}", "give it a name of its own"
                )
            self.parameters.append(ParameterSpec(name=name, shape=shape, offset=self.parameter_count))
            self.variables.append(variable)
        self._weights[id(layer)] = places

    def _trace(self, model: Any) -> None:
        """Follow the calls of a model's layers from input to output, and into models that are layers."""
        for node in _calls(model):
            layer = node.layer
            sources = tuple(id(tensor) for tensor in node.keras_inputs)
            if _is_model(layer):
                self._steps.append(_Rename(sources[0], id(layer.inputs[0])))
                self._trace(layer)
                self._steps.append(_Rename(id(layer.outputs[0]), id(node.outputs)))
                continue
            lowered = self._lowered[id(layer)]
            # By identity: a value may be a tensor.
            unknown = [n for n, value in node.call_kwargs.items() if value is not None and value is not False]
            if unknown:
                raise UnsupportedLayer(layer, f"it is called with {unknown}", "call it on its inputs alone")
            if isinstance(lowered, Dropout):
                size = int(np.prod(node.keras_inputs[0].shape[1:]))
                self.dropouts.append((size, lowered.rate))
            if isinstance(lowered, Embedding) and sources == (self._input,):
                self.vocabulary = int(layer.input_dim)
            self._steps.append(_Step(lowered, sources, id(node.outputs)))

    def refuse_probabilities(self) -> None:
        """Refuse a softmax or sigmoid at the end, before layers that rearrange too: a cross-entropy has it.

        Raises:
            UnsupportedLayer: there is one.
        """
        for step in reversed(self._steps):
            if isinstance(step, _Rename):
                continue
            layer = step.layer.layer
            name = getattr(getattr(layer, "activation", None), "__name__", "")
            if isinstance(layer, tf.keras.layers.Softmax) or name in {"softmax", "sigmoid"}:
                raise UnsupportedLayer(
                    layer,
                    f"its {name or 'softmax'} is already part of the loss",
                    "remove it: the last layer gives logits, and predictions are made probabilities on the "
                    "device",
                )
            if not isinstance(step.layer, Rearranged | Dropout):
                return


def check_form(model: Any) -> None:
    """Look at a model as a whole, before its layers.

    Raises:
        UnsupportedModel: no Keras model, not built, without exactly one input and one output, of shapes that
            are not fixed or no logits, or too large; says what to do.
    """
    if not _is_model(model):
        raise UnsupportedModel(
            f"a {type(model).__name__} is no Keras model: give a Sequential or functional one"
        )
    name = f"model {model.name!r}"
    if isinstance(model, tf.keras.Sequential) and not model.inputs:
        raise UnsupportedModel(f"{name} must be built: let it begin with tf.keras.layers.Input(shape)")
    if not getattr(model, "_is_graph_network", False):
        raise UnsupportedModel(
            f"{name} is a subclass of Model, whose calls cannot be followed: "
            "build it as Sequential, or as tf.keras.Model(inputs, outputs)"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UnsupportedModel(
            f"{name} needs one input and one output, and its numbers of them are {len(model.inputs)} and "
            f"{len(model.outputs)}: measure into one array, and join outputs by Concatenate"
        )
    shape, outputs = tuple(model.inputs[0].shape[1:]), tuple(model.outputs[0].shape)
    if not shape or None in shape:
        raise UnsupportedModel(
            f"{name} takes {shape}, not a fixed input shape: give every axis a length, and cut or pad the "
            "data to it"
        )
    if len(outputs) != 2:
        raise UnsupportedModel(
            f"{name} gives {outputs}, not logits (n, classes): let it end with Flatten or global pooling, "
            "and Dense"
        )
    trained = sum(variable.shape.num_elements() for variable in model.trainable_weights)
    fixed = FLOAT32_BYTES * sum(variable.shape.num_elements() for variable in model.non_trainable_weights)
    if trained > MAX_PARAMETERS or fixed > MAX_GRAPH_BYTES:
        raise UnsupportedModel(
            f"{name} has {trained:,} weights to train and {fixed:,} bytes of fixed ones; devices take "
            f"{MAX_PARAMETERS:,} and {MAX_GRAPH_BYTES:,}: make its layers narrower"
        )


def _finite(layer: Any, variable: Any) -> NDArray[np.float32]:
    """A weight's values, of which none is infinite or NaN."""
    values = np.asarray(variable, np.float32)
    if not np.isfinite(values).all():
        raise UnsupportedLayer(
            layer, f"its {variable.name} is not finite everywhere", "load or train its weights again"
        )
    return values


def _is_model(layer: Any) -> bool:
    return isinstance(layer, tf.keras.Model)


def _leaves(model: Any) -> Iterator[Any]:
    """All layers that compute, also those of models that are layers; inputs come first."""
    for layer in model.layers:
        if _is_model(layer):
            if len(layer.inputs or ()) != 1 or len(layer.outputs or ()) != 1:
                raise UnsupportedLayer(
                    layer, "it is a model without exactly one input and one output", "use its layers"
                )
            yield from _leaves(layer)
        elif type(layer) is not tf.keras.layers.InputLayer:
            yield layer


def _named_leaves(model: Any, names: Sequence[str]) -> set[int]:
    """The ids of the layers with these names, and of those inside models with these names.

    Raises:
        UnsupportedModel: no layer has that name, or none of its weights is trainable.
    """
    found: set[int] = set()
    for name in names:
        layer = next((layer for layer in _all_layers(model) if layer.name == name), None)
        if layer is None or not layer.trainable_weights:
            reason = "there is no such layer" if layer is None else "it has no weights to train"
            raise UnsupportedModel(f"local layer {name!r} of model {model.name!r}: {reason}")
        found.update(id(leaf) for leaf in (_leaves(layer) if _is_model(layer) else [layer]))
    return found


def _all_layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        if _is_model(layer):
            yield from _all_layers(layer)


def _calls(model: Any) -> Iterator[Any]:
    """The calls of a model's layers, inputs first."""
    by_depth = model._nodes_by_depth
    for depth in sorted(by_depth, reverse=True):
        for node in by_depth[depth]:
            if type(node.layer) is not tf.keras.layers.InputLayer:
                yield node


def _parameter_name(layer: Any, variable: Any) -> str:
    """`layer/kernel`, or `layer/cell/kernel`."""
    path = str(variable.name).split(":")[0]
    return path if path.startswith(f"{layer.name}/") else f"{layer.name}/{path.rsplit('/', 1)[-1]}"
