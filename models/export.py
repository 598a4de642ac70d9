"""Export a Keras model as a `.tflite` that trains with builtin operators only.

    python -m models.export watch --out DIR

writes `model.tflite`, `weights.bin` and `manifest.json`. Runs on a developer's machine; needs TensorFlow.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before TensorFlow starts: its notes on the machine are no part of an export's output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.lite.python.convert import ConverterError

from models import flatbuffer
from models.losses import LOSSES
from models.manifest import (
    REGRESSION_LOSSES,
    DropoutSpec,
    InputSpec,
    LossName,
    ModelManifest,
    OptimizerSpec,
    SignatureSpec,
    TargetSpec,
    describe,
)
from models.network import Network, UnsupportedModel
from models.parity import RUNTIMES, prove_parity
from models.program import TrainingForm, build_program, signatures_of
from models.weights import encode_weights

GRAPH_FILE = "model.tflite"
WEIGHTS_FILE = "weights.bin"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ExportedModel:
    """The three files of one model version; the graph says where local parameters start."""

    manifest: ModelManifest
    graph: bytes
    weights: NDArray[np.float32]

    def write(self, directory: Path) -> None:
        """Write the three files into a directory, which is made if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / GRAPH_FILE).write_bytes(self.graph)
        (directory / WEIGHTS_FILE).write_bytes(encode_weights(self.weights))
        (directory / MANIFEST_FILE).write_bytes(self.manifest.to_bytes())


def export(
    model: Any,
    *,
    name: str,
    labels: Sequence[str],
    scaling: InputSpec,
    train_batch_size: int,
    loss: LossName = "sparse_categorical_crossentropy",
    target: TargetSpec | None = None,
    optimizer: OptimizerSpec | None = None,
    accumulation: int = 1,
    local_layers: Sequence[str] = (),
    example_gradients: bool = False,
) -> ExportedModel:
    """Version 1 of a Keras model as a trainable graph, a weights file and a manifest.

    Weights that are not trainable become constants of the graph, and do not travel. Those of local layers
    train on each device and never leave it.

    Args:
        model: built Keras model, Sequential or functional, from one input to logits or values (n, k).
        name: slug of the model.
        labels: names of the classes, or of the predicted labels or values.
        scaling: the input as the device measures it.
        train_batch_size: examples in one call of `train`.
        loss: what training lowers; the model gives one logit for `binary_crossentropy`.
        target: scaling of predicted values; by default none.
        optimizer: what a step does with a gradient; by default plain gradient descent.
        accumulation: calls of `train` that make one step of the optimizer.
        local_layers: names of layers whose weights stay on each device, the head of a classifier say.
        example_gradients: whether devices may train it in privacy mode example; it makes the graph larger.

    Raises:
        UnsupportedLayer: a layer cannot be exported; names it, the reason and the alternative.
        UnsupportedModel: the model as a whole cannot be exported.
        NonBuiltinOperator: the converter used an operator that the small runtimes lack.
        ParityError: the graph's gradients differ from TensorFlow's, in its own runtime or the small one.
        ValueError: the model does not fit its input, labels or loss.
    """
    if example_gradients and local_layers:
        raise ValueError("mode example hides examples in every parameter that trains: none can be local")
    network = Network(model, local_layers)
    _check_ends(network, scaling, labels, loss)
    if network.vocabulary != scaling.vocabulary:
        scaling = InputSpec.model_validate(dict(scaling) | {"vocabulary": network.vocabulary})
    form = TrainingForm(
        batch=train_batch_size,
        loss=loss,
        target=target or default_target(loss, len(labels)),
        optimizer=optimizer or OptimizerSpec(),
        accumulation=accumulation,
        example_gradients=example_gradients,
    )
    shared = network.shared_count
    weights = network.flat_weights()[:shared]
    # Whatever the manifest refuses is said before the conversion, which takes its time.
    manifest = ModelManifest(
        name=name,
        version=1,
        graph=describe(b"not yet"),
        weights=describe(encode_weights(weights)),
        signatures=signatures_of(network, form),
        input=scaling,
        labels=tuple(labels),
        loss=loss,
        target=form.target,
        optimizer=form.optimizer,
        accumulation=accumulation,
        dropouts=tuple(DropoutSpec(size=size, rate=rate) for size, rate in network.dropouts),
        train_batch_size=train_batch_size,
        parameter_count=shared,
        parameters=tuple(part for part in network.parameters if part.offset < shared),
        local_parameters=tuple(
            part.model_copy(update={"offset": part.offset - shared})
            for part in network.parameters
            if part.offset >= shared
        ),
    )
    graph = flatbuffer.finish(_convert(build_program(network, form), manifest.signatures))
    manifest = ModelManifest.model_validate(dict(manifest) | {"graph": describe(graph)})
    for runtime in RUNTIMES:
        prove_parity(model, graph, manifest, interpreter=runtime)
    return ExportedModel(manifest, graph, weights)


def _check_ends(network: Network, scaling: InputSpec, labels: Sequence[str], loss: LossName) -> None:
    """Refuse a model that does not go from this input to these labels.

    Raises:
        ValueError: another shape, or another number of outputs than labels and loss need; or no such loss.
        UnsupportedLayer: probabilities at the end of what a cross-entropy trains.
    """
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss}: choose one of {', '.join(LOSSES)}")
    if network.example_shape != scaling.shape:
        raise ValueError(
            f"the model takes inputs {network.example_shape}, but the scaling is of {scaling.shape}"
        )
    outputs = 1 if loss == "binary_crossentropy" else len(labels)
    if network.classes != outputs:
        raise ValueError(
            f"the model gives {network.classes} outputs, but {len(labels)} labels under the loss {loss} "
            f"need {outputs}"
        )
    if loss not in REGRESSION_LOSSES:
        network.refuse_probabilities()


def default_target(loss: LossName, count: int) -> TargetSpec:
    """The target of a loss; predicted values are taken as they are."""
    if loss in {"sparse_categorical_crossentropy", "binary_crossentropy"}:
        return TargetSpec()
    if loss == "multi_label_crossentropy":
        return TargetSpec(shape=(count,), dtype="float32")
    return TargetSpec(shape=(count,), dtype="float32", mean=(0.0,) * count, std=(1.0,) * count)


def _convert(module: Any, specs: Sequence[SignatureSpec]) -> bytes:
    signatures = {spec.name: getattr(module, spec.name).get_concrete_function() for spec in specs}
    with tempfile.TemporaryDirectory() as directory, _without_warnings():
        # The gradients are in the train function already; saved ones would be traced for unknown batch sizes.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, directory, signatures=signatures, options=options)
        converter = tf.lite.TFLiteConverter.from_saved_model(directory)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        try:
            return bytes(converter.convert())
        except ConverterError as error:
            hint = "; it may without example_gradients" if "gradient" in signatures else ""
            reason = str(error).strip().splitlines()[0][-200:]
            raise UnsupportedModel(f"TensorFlow's converter gives up on the model{hint}: {reason}") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """TensorFlow warns that gradients are not saved, which is meant and would alarm an author."""

    def other(record: logging.LogRecord) -> bool:
        return "unsaved custom gradients" not in str(record.msg)

    # By a filter, since TensorFlow sets the level itself while it saves.
    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export one of Covey's own models."""
    from models.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("name", choices=sorted(ARCHITECTURES))
    parser.add_argument("--out", type=Path, required=True, help="directory for the three files")
    options = parser.parse_args(arguments)
    exported = ARCHITECTURES[options.name].export()
    exported.write(options.out)
    sys.stdout.write(
        f"{options.name}: {exported.manifest.parameter_count} parameters, "
        f"graph {len(exported.graph)} bytes -> {options.out}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
