"""Local parameters: exported, trained with the others, and in nothing that leaves a device."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, ExamplesRejected, ModelRejected, TrainingConfig, WeightsRejected
from models import zoo
from models.export import ExportedModel, export
from models.inference import convert
from models.inspection import describe_manifest
from models.manifest import InputSpec, InvalidManifest, ModelManifest, describe
from models.network import Network, UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCALING = InputSpec(shape=(6,), mean=(0.0,) * 6, std=(1.0,) * 6)
CONFIG = TrainingConfig(local_epochs=3, learning_rate=0.1, proximal_mu=0.5)


def body_and_head() -> Any:
    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(1)
    body = tf.keras.Sequential(
        [layers.Input((6,)), layers.Dense(5, "relu", name="first"), layers.Dense(4, "tanh", name="second")],
        name="body",
    )
    return tf.keras.Sequential([layers.Input((6,)), body, layers.Dense(3, name="head")], name="both")


def exported(*local: str) -> ExportedModel:
    return export(
        body_and_head(),
        name="both",
        labels=("a", "b", "c"),
        scaling=SCALING,
        train_batch_size=8,
        local_layers=local,
    )


@pytest.fixture(scope="module")
def own_head() -> ExportedModel:
    return exported("head")


def blobs(count: int = 60) -> Examples:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, count).astype(np.int32)
    x = random.normal(size=(count, 6)) + 2.0 * np.eye(6)[y]
    return Examples("blobs", x.astype(np.float32), y)


def names(manifest: ModelManifest) -> tuple[list[str], list[str]]:
    return [part.name for part in manifest.parameters], [part.name for part in manifest.local_parameters]


def test_local_layers_have_a_vector_of_their_own(own_head: ExportedModel) -> None:
    manifest = own_head.manifest
    assert names(manifest) == (
        ["first/kernel", "first/bias", "second/kernel", "second/bias"],
        ["head/kernel", "head/bias"],
    )
    assert manifest.parameter_count == len(own_head.weights) == 7 * 5 + 6 * 4
    assert manifest.local_count == 5 * 3
    assert manifest.weights.size == 4 * manifest.parameter_count
    assert ModelManifest.from_bytes(manifest.to_bytes()) == manifest
    assert any("never leave" in line for line in describe_manifest(manifest))


def test_a_layer_before_a_shared_one_and_a_whole_model_can_be_local() -> None:
    first = exported("first")
    assert names(first.manifest) == (
        ["second/kernel", "second/bias", "head/kernel", "head/bias"],
        ["first/kernel", "first/bias"],
    )
    # A graph for prediction alone takes both vectors in the same order.
    model = body_and_head()
    network = Network(model, ("first",))
    graph = convert(network, network.flat_weights(), "float32")
    interpreter = tf.lite.Interpreter(model_content=graph)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], (60, 6))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], blobs().x)
    interpreter.invoke()
    logits = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.abs(logits - model(blobs().x).numpy()).max() < 1e-5
    predicted = TfliteTrainer(first.manifest, first.graph).predict(first.weights, blobs().x)
    assert np.array_equal(predicted.argmax(axis=1), logits.argmax(axis=1))
    whole = Network(body_and_head(), ("body",))
    assert [part.name for part in whole.parameters[:2]] == ["head/kernel", "head/bias"]
    assert whole.shared_count == 15


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        (("hat",), "no such layer"),
        (("body", "head"), "to train and share"),
        (("frozen",), "no weights to train"),
    ],
)
def test_layers_that_cannot_be_local_are_refused(local: tuple[str, ...], reason: str) -> None:
    model = body_and_head()
    if local == ("frozen",):
        layers = tf.keras.layers
        frozen = layers.Dense(6, trainable=False, name="frozen")
        model = tf.keras.Sequential([layers.Input((6,)), frozen, layers.Dense(3)])
    with pytest.raises(UnsupportedModel, match=reason):
        Network(model, local)


def test_both_parts_train_as_one_model_does(own_head: ExportedModel) -> None:
    """The step is that of the undivided model; only the proximal term leaves local parameters alone."""
    whole, split = exported(), own_head
    assert np.array_equal(whole.weights[: len(split.weights)], split.weights)
    config = replace(CONFIG, proximal_mu=0.0)
    wanted = TfliteTrainer(whole.manifest, whole.graph).train(
        whole.weights, blobs(), config, config.generator()
    )
    found = TfliteTrainer(split.manifest, split.graph).train(
        split.weights, blobs(), config, config.generator()
    )
    assert found.delta.shape == split.weights.shape
    assert found.local is not None
    moved = np.concatenate([split.weights + found.delta, found.local]) - whole.weights
    assert np.abs(moved).max() > 0.1
    assert np.abs(moved - wanted.delta).max() < 1e-5
    assert found.accuracy == wanted.accuracy


def test_training_goes_on_from_the_local_parameters_given(own_head: ExportedModel) -> None:
    trainer = TfliteTrainer(own_head.manifest, own_head.graph)
    first = trainer.train(own_head.weights, blobs(), CONFIG, CONFIG.generator())
    assert first.local is not None
    given = first.local.copy()
    second = trainer.train(own_head.weights, blobs(), CONFIG, CONFIG.generator(), first.local)
    assert np.array_equal(first.local, given)
    assert second.loss_before < first.loss_before
    anew = trainer.train(own_head.weights, blobs(), CONFIG, CONFIG.generator())
    assert np.array_equal(anew.delta, first.delta)
    assert anew.local is not None and np.array_equal(anew.local, first.local)
    here = trainer.evaluate(own_head.weights + first.delta, blobs(), first.local)
    assert here.loss == pytest.approx(first.loss_after)
    assert trainer.evaluate(own_head.weights + first.delta, blobs()).loss != pytest.approx(first.loss_after)


def test_the_proximal_term_pulls_shared_parameters_only(own_head: ExportedModel) -> None:
    trainer = TfliteTrainer(own_head.manifest, own_head.graph)
    free, held = (
        trainer.train(own_head.weights, blobs(), replace(CONFIG, proximal_mu=mu), CONFIG.generator())
        for mu in (0.0, 8.0)
    )
    assert held.l2_norm < 0.5 * free.l2_norm
    assert held.local is not None and free.local is not None
    first = np.asarray(body_and_head().get_layer("head").kernel).ravel()
    moved = [np.linalg.norm(update.local[: len(first)] - first) for update in (free, held)]
    assert moved[1] > 0.5 * moved[0]


@pytest.mark.parametrize(
    "local", [np.zeros(14, np.float32), np.zeros(15, np.float64), np.full(15, np.nan, np.float32)]
)
def test_local_parameters_that_do_not_fit_are_refused(own_head: ExportedModel, local: NDArray[Any]) -> None:
    trainer = TfliteTrainer(own_head.manifest, own_head.graph)
    with pytest.raises(WeightsRejected, match="local"):
        trainer.predict(own_head.weights, blobs().x, local)


def test_a_model_without_local_parameters_takes_none() -> None:
    watch = zoo.load("watch")
    trainer = TfliteTrainer(watch.manifest, watch.graph)
    with pytest.raises(WeightsRejected, match="local"):
        trainer.predict(watch.weights, np.zeros((1, 100, 6), np.float32), np.zeros(4, np.float32))
    with pytest.raises(ExamplesRejected):
        trainer.predict(watch.weights, np.zeros((0, 100, 6), np.float32))


def test_a_manifest_that_lies_about_local_parameters_is_refused(own_head: ExportedModel) -> None:
    content = json.loads(own_head.manifest.to_bytes())
    head = content["local_parameters"]

    def changed(**changes: object) -> bytes:
        return json.dumps(content | changes, sort_keys=True, separators=(",", ":")).encode()

    assert ModelManifest.from_bytes(changed()) == own_head.manifest
    for lie, reason in [
        ({"local_parameters": []}, "come together"),
        ({"local_parameters": [head[1]]}, "starts at"),
        ({"local_parameters": [head[0] | {"name": "first/bias"}, head[1]]}, "twice"),
        ({"signatures": content["signatures"][:4]}, "come together"),
    ]:
        with pytest.raises(InvalidManifest, match=reason):
            ModelManifest.from_bytes(changed(**lie))
    larger = [head[0] | {"shape": [5, 3]}, head[1] | {"offset": 15}]
    with pytest.raises(ModelRejected, match="local"):
        TfliteTrainer(ModelManifest.from_bytes(changed(local_parameters=larger)), own_head.graph)


def test_a_manifest_without_local_parameters_keeps_its_bytes() -> None:
    manifest = zoo.load("watch").manifest
    assert b"local" not in manifest.to_bytes()
    spelled_out = json.dumps(
        json.loads(manifest.to_bytes()) | {"local_parameters": []}, sort_keys=True, separators=(",", ":")
    )
    with pytest.raises(InvalidManifest, match="canonical"):
        ModelManifest.from_bytes(spelled_out.encode())


def test_versions_share_local_parameters_as_long_as_their_shapes_stay(own_head: ExportedModel) -> None:
    manifest = own_head.manifest
    later = manifest.next_version((own_head.weights + 1).astype("<f4").tobytes())
    assert later.local_layout == manifest.local_layout
    assert later.weights != describe(own_head.weights.tobytes())
    wider = manifest.local_parameters[0].model_copy(update={"shape": (2, 6)})
    other = manifest.model_copy(update={"local_parameters": (wider, manifest.local_parameters[1])})
    assert other.local_layout != manifest.local_layout
