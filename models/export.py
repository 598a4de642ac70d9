"""Export a Keras model as a `.tflite` that trains with builtin operators only.

    python -m models.export watch --out DIR

writes `model.tflite`, `weights.bin` and `manifest.json`. Runs on a developer's machine; needs TensorFlow.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before TensorFlow starts: its notes on the machine are no part of an export's output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models import flatbuffer
from models.layers.primitives import Tensor, sparse_cross_entropy
from models.manifest import InputSpec, ModelManifest, SignatureSpec, describe
from models.network import Network
from models.parity import prove_parity
from models.weights import encode_weights

GRAPH_FILE = "model.tflite"
WEIGHTS_FILE = "weights.bin"
MANIFEST_FILE = "manifest.json"

SIGNATURES = (
    SignatureSpec(name="train", inputs=("x", "y", "mask", "lr", "mu"), outputs=("loss",)),
    SignatureSpec(name="infer", inputs=("x",), outputs=("logits",)),
    SignatureSpec(name="get_weights", inputs=(), outputs=("weights",)),
    SignatureSpec(name="set_weights", inputs=("weights",), outputs=("count",)),
)


@dataclass(frozen=True)
class ExportedModel:
    """The three files of one model version."""

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
    model: Any, *, name: str, labels: Sequence[str], scaling: InputSpec, train_batch_size: int
) -> ExportedModel:
    """Version 1 of a Keras classifier as a trainable graph, a weights file and a manifest.

    Args:
        model: built Keras model, Sequential or functional, from one input to logits.
        name: slug of the model.
        labels: class names, one for each logit.
        scaling: the input as the device measures it.
        train_batch_size: examples in one training step.

    Raises:
        UnsupportedLayer: a layer cannot be exported; names it, the reason and the alternative.
        UnsupportedModel: the model as a whole cannot be exported.
        NonBuiltinOperator: the converter used an operator that the small runtimes lack.
        ParityError: the graph's gradients differ from TensorFlow's.
    """
    network = Network(model)
    if network.example_shape != scaling.shape or network.classes != len(labels):
        raise ValueError(
            f"the model maps {network.example_shape} to {network.classes} classes, "
            f"the manifest says {scaling.shape} and {len(labels)} labels"
        )
    graph = flatbuffer.finish(_convert(_program(network, train_batch_size)))
    weights = network.flat_weights()
    manifest = ModelManifest(
        name=name,
        version=1,
        graph=describe(graph),
        weights=describe(encode_weights(weights)),
        signatures=SIGNATURES,
        input=scaling,
        labels=tuple(labels),
        loss="sparse_categorical_crossentropy",
        train_batch_size=train_batch_size,
        parameter_count=network.parameter_count,
        parameters=tuple(network.parameters),
    )
    prove_parity(model, graph, manifest)
    return ExportedModel(manifest, graph, weights)


def _program(network: Network, batch: int) -> Any:
    """The four entry points, as functions over two variables: the parameters, and where training started."""
    count = network.parameter_count
    module = tf.Module()
    module.theta = tf.Variable(tf.zeros([count]), name="theta")
    module.anchor = tf.Variable(tf.zeros([count]), name="anchor")

    def train(x: Tensor, y: Tensor, mask: Tensor, lr: Tensor, mu: Tensor) -> dict[str, Tensor]:
        theta = module.theta.read_value()
        values = network.split(theta)
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = sparse_cross_entropy(network.forward(values, x), y, mask)
        gradients = tape.gradient(loss, values)
        gradient = tf.concat([tf.reshape(part, [-1]) for part in gradients], 0)
        # FedProx (Li et al. 2020, arXiv 1812.06127, eq. 2): the gradient of mu/2 |theta - anchor|^2.
        pull = mu * (theta - module.anchor.read_value())
        module.theta.assign(theta - lr * (gradient + pull))
        return {"loss": loss}

    def infer(x: Tensor) -> dict[str, Tensor]:
        return {"logits": network.forward(network.split(module.theta.read_value()), x)}

    def get_weights() -> dict[str, Tensor]:
        return {"weights": module.theta.read_value()}

    def set_weights(weights: Tensor) -> dict[str, Tensor]:
        module.theta.assign(weights)
        module.anchor.assign(weights)
        return {"count": tf.size(weights)}

    shape = network.example_shape
    inputs: dict[str, tuple[Any, list[Any]]] = {
        "train": (
            train,
            [
                tf.TensorSpec([batch, *shape], tf.float32, "x"),
                tf.TensorSpec([batch], tf.int32, "y"),
                tf.TensorSpec([batch], tf.float32, "mask"),
                tf.TensorSpec([], tf.float32, "lr"),
                tf.TensorSpec([], tf.float32, "mu"),
            ],
        ),
        "infer": (infer, [tf.TensorSpec([None, *shape], tf.float32, "x")]),
        "get_weights": (get_weights, []),
        "set_weights": (set_weights, [tf.TensorSpec([count], tf.float32, "weights")]),
    }
    for name, (function, signature) in inputs.items():
        setattr(module, name, tf.function(function, input_signature=signature))
    return module


def _convert(module: Any) -> bytes:
    signatures = {spec.name: getattr(module, spec.name).get_concrete_function() for spec in SIGNATURES}
    with tempfile.TemporaryDirectory() as directory:
        # The gradients are in the train function already; saved ones would be traced for unknown batch sizes.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, directory, signatures=signatures, options=options)
        converter = tf.lite.TFLiteConverter.from_saved_model(directory)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        return bytes(converter.convert())


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
