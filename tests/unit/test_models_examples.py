"""The gradients of single examples in exported graphs, against TensorFlow's Jacobian of the losses."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.model_check import check_in_child
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import ModelRejected
from models import export as exporter
from models import flatbuffer, zoo
from models.architectures import ARCHITECTURES
from models.export import ExportedModel, export
from models.losses import stock_losses
from models.manifest import InputSpec, LossName, ModelManifest, OptimizerSpec, TargetSpec, describe
from models.network import Network
from models.parity import GradientParityError, prove_parity
from models.program import TrainingForm, build_program
from models.weights import encode_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers


def exported(parts: list[Any], shape: tuple[int, ...], **options: Any) -> tuple[Any, ExportedModel]:
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(3)
    model = tf.keras.Sequential([layers.Input(shape), *parts])
    scaling = InputSpec(shape=shape, mean=(0.0,) * shape[-1], std=(1.0,) * shape[-1])
    made = export(
        model,
        name="try",
        labels=["a", "b", "c"],
        scaling=scaling,
        train_batch_size=8,
        example_gradients=True,
        **options,
    )
    return model, made


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_bundled_model_gives_tensorflows_gradient_of_each_example(name: str) -> None:
    model, bundled = ARCHITECTURES[name].build_seeded(), zoo.load(name)
    random = np.random.default_rng(1)
    x = random.normal(size=(6, *bundled.manifest.input.shape)).astype(np.float32)
    y = random.integers(0, len(bundled.manifest.labels), 6).astype(np.int32)
    variables = Network(model).variables
    with tf.GradientTape() as tape:
        losses = stock_losses(bundled.manifest.loss, model(x), y)
    parts = tape.jacobian(losses, variables)
    expected = np.concatenate([part.numpy().reshape(6, -1) for part in parts], axis=1)
    run = TfliteTrainer(bundled.manifest, bundled.graph)._run
    run["set_weights"](weights=bundled.weights)
    found = [run["gradient"](x=x[i : i + 1], y=y[i : i + 1])["gradient"] for i in range(6)]
    assert np.abs(np.stack(found) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("loss", "optimizer", "options"),
    [
        ("sparse_categorical_crossentropy", "momentum", {"accumulation": 2}),
        ("multi_label_crossentropy", "adam", {}),
        ("huber", "sgd", {}),
    ],
)
def test_every_kind_of_training_form_is_proved(
    loss: LossName, optimizer: Any, options: dict[str, Any]
) -> None:
    parts = [layers.Dense(6, activation="tanh"), layers.Dropout(0.25), layers.Dense(3)]
    _, made = exported(parts, (5,), loss=loss, optimizer=OptimizerSpec(kind=optimizer), **options)
    assert made.manifest.example_gradients
    (inputs,) = (s.inputs for s in made.manifest.signatures if s.name == "gradient")
    assert inputs == ("x", "y", "keep")


def test_a_wrong_gradient_of_one_example_is_found() -> None:
    model, made = exported([layers.Dense(4, activation="relu"), layers.Dense(3)], (5,))

    class Wrong:
        """A runtime whose single gradients are off by 1 %; everything else is right."""

        def __init__(self, model_content: bytes, num_threads: int) -> None:
            self._inner = tf.lite.Interpreter(model_content=model_content, num_threads=num_threads)

        def allocate_tensors(self) -> None:
            self._inner.allocate_tensors()

        def get_signature_list(self) -> Any:
            return self._inner.get_signature_list()

        def get_signature_runner(self, name: str) -> Any:
            run = self._inner.get_signature_runner(name)
            if name != "gradient":
                return run
            return lambda **inputs: {"gradient": 1.01 * run(**inputs)["gradient"]}

    with pytest.raises(GradientParityError, match="for one example"):
        prove_parity(model, made.graph, made.manifest, interpreter=Wrong)


def test_local_layers_and_single_gradients_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="none can be local"):
        exported([layers.Dense(4), layers.Dense(3, name="head")], (5,), local_layers=("head",))


def test_products_with_a_batch_of_one_are_converted() -> None:
    """The converter stops at one row in a batch of matrices, which dense layers of other batches are."""
    made = replace(ARCHITECTURES["anomaly"], example_gradients=True).export()
    assert made.manifest.example_gradients


@pytest.mark.parametrize("entry", ["gradient", "infer", "get_weights"])
def test_a_graph_that_remembers_examples_is_refused(entry: str) -> None:
    """What it remembers would leave the device in its next weights, past clipping and noise."""
    model, made = exported([layers.Dense(3)], (5,))
    network = Network(model)
    form = TrainingForm(8, "sparse_categorical_crossentropy", TargetSpec(), OptimizerSpec(), 1, True)
    module = build_program(network, form)
    honest = getattr(module, entry)

    def remembering(*given: Any) -> Any:
        found = honest(*given)
        told = tf.reduce_sum(given[0]) if given else 1.0
        module.anchor.assign(module.anchor.read_value() + told)
        return found

    signature = list(honest.input_signature)
    names = [spec.name for spec in signature]
    forms = {0: lambda: remembering(), 1: lambda x: remembering(x), 2: lambda x, y: remembering(x, y)}
    setattr(module, entry, tf.function(forms[len(names)], input_signature=signature, autograph=False))
    graph = flatbuffer.finish(exporter._convert(module, made.manifest.signatures))
    hostile = ModelManifest.model_validate(dict(made.manifest) | {"graph": describe(graph)})
    weights = encode_weights(made.weights)
    check_in_child(made.manifest, made.graph, weights)
    with pytest.raises(ModelRejected, match=f"the entry point {entry} changes variables"):
        check_in_child(hostile, graph, weights)
