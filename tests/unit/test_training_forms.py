"""Losses, optimizers, accumulation and dropout as the device runs them, against Keras and NumPy."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, ExamplesRejected, TrainingConfig
from models.export import ExportedModel, export
from models.manifest import InputSpec, OptimizerSpec, TargetSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers
BATCH = 4


def made(outputs: int, labels: int, *parts: Any, **options: Any) -> tuple[Any, ExportedModel, TfliteTrainer]:
    """A small model of five inputs, its export, and a trainer."""
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(3)
    model = tf.keras.Sequential(
        [layers.Input((5,)), layers.Dense(6, activation="tanh"), *parts, layers.Dense(outputs)]
    )
    exported = export(
        model,
        name="try",
        labels=[f"label {index}" for index in range(labels)],
        scaling=InputSpec(shape=(5,), mean=(0.0,) * 5, std=(1.0,) * 5),
        train_batch_size=BATCH,
        **options,
    )
    return model, exported, TfliteTrainer(exported.manifest, exported.graph)


def inputs(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)


def trained(trainer: TfliteTrainer, made: ExportedModel, examples: Examples, config: TrainingConfig) -> Any:
    return trainer.train(made.weights, examples, config, np.random.default_rng(9)).delta


THREADS = """
import os, sys
from pathlib import Path
import numpy as np
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models.manifest import ModelManifest

here = Path(sys.argv[1])
manifest = ModelManifest.from_bytes((here / "manifest.json").read_bytes())
weights = np.frombuffer((here / "weights.bin").read_bytes(), np.float32)
examples = Examples("some", np.ones((4, 5), np.float32), np.arange(4, dtype=np.int32) % 3)
for threads in (1, 2):
    before = len(os.listdir("/proc/self/task"))
    trainer = TfliteTrainer(manifest, (here / "model.tflite").read_bytes(), threads=threads)
    delta = trainer.train(weights, examples, TrainingConfig(2, 0.05), np.random.default_rng(9)).delta
    print(len(os.listdir("/proc/self/task")) - before, float(np.square(delta).sum()))
"""


def test_a_second_thread_is_one_and_changes_nothing(tmp_path: Path) -> None:
    """Another pool of threads, which waits by spinning too, would take the cores from the first."""
    _, exported, _ = made(3, 3, layers.Dense(512, name="wide"), layers.Dense(512, name="wider"))
    exported.write(tmp_path)
    command = [sys.executable, "-c", THREADS, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    alone, two = (line.split() for line in run.stdout.splitlines())
    assert (alone[0], two[0]) == ("0", "1")
    assert float(two[1]) == pytest.approx(float(alone[1]), rel=1e-4)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_optimizers_step_as_keras_does_and_forget_between_rounds(kind: Any) -> None:
    model, exported, trainer = made(3, 3, optimizer=OptimizerSpec(kind=kind))
    y = np.arange(10, dtype=np.int32) % 3
    examples, config = Examples("some", inputs(10), y), TrainingConfig(3, 0.05)
    delta = trained(trainer, exported, examples, config)
    assert np.array_equal(delta, trained(trainer, exported, examples, config))

    stock = tf.keras.optimizers.SGD(0.05, 0.9) if kind == "momentum" else tf.keras.optimizers.Adam(0.05)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    random = np.random.default_rng(9)
    for _ in range(config.local_epochs):
        order = random.permutation(10)
        for start in range(0, 10, BATCH):
            chosen = order[start : start + BATCH]
            with tf.GradientTape() as tape:
                value = loss(y[chosen], model(examples.x[chosen]))
            gradients = tape.gradient(value, model.trainable_variables)
            stock.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    np.testing.assert_allclose(exported.weights + delta, weights, atol=2e-5)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("count", [12, 17])
def test_accumulated_batches_are_one_step_on_all_their_examples(kind: Any, count: int) -> None:
    """Also where the last step has fewer batches, and the last batch fewer examples."""
    _, exported, trainer = made(3, 3, optimizer=OptimizerSpec(kind=kind), accumulation=3)
    _, large, reference = made(3, 3, optimizer=OptimizerSpec(kind=kind))
    y = np.arange(count, dtype=np.int32) % 3
    x, rate = inputs(count), 0.1
    delta = trained(trainer, exported, Examples("some", x, y), TrainingConfig(1, rate))
    order = np.random.default_rng(9).permutation(count)
    if kind == "sgd":
        weights = large.weights
        for start in range(0, count, 3 * BATCH):
            chosen = order[start : start + 3 * BATCH]
            single = TrainingConfig(1, rate)
            each = [
                trained_from(reference, weights, Examples("one", x[i : i + 1], y[i : i + 1]), single)
                for i in chosen
            ]
            weights = weights + np.mean(each, axis=0, dtype=np.float32)
        np.testing.assert_allclose(delta, weights - large.weights, atol=3e-6)
    else:
        # One step of Adam moves every parameter that has a gradient by the learning rate.
        steps = -(-count // (3 * BATCH))
        assert float(np.abs(delta).max()) <= steps * rate * 1.001
        assert float(np.median(np.abs(delta))) > 0.1 * rate


def trained_from(
    trainer: TfliteTrainer, weights: NDArray[np.float32], examples: Examples, config: TrainingConfig
) -> NDArray[np.float32]:
    return trainer.train(weights, examples, config, np.random.default_rng(0)).delta


def test_dropout_drops_in_training_by_the_generator_and_never_in_prediction() -> None:
    _, exported, trainer = made(3, 3, layers.Dropout(0.5))
    assert [(part.size, part.rate) for part in exported.manifest.dropouts] == [(6, 0.5)]
    _, plain, undropped = made(3, 3)
    x, y = inputs(8), np.arange(8, dtype=np.int32) % 3
    np.testing.assert_array_equal(trainer.predict(exported.weights, x), undropped.predict(plain.weights, x))
    config = TrainingConfig(1, 0.1)
    one = Examples("one", x[:1], y[:1])
    first = trained(trainer, exported, one, config)
    assert np.array_equal(first, trained(trainer, exported, one, config))
    # What reaches a dropped unit's outgoing weights is nothing at all.
    outgoing = exported.manifest.parameters[2]
    rows = first[outgoing.offset : outgoing.offset + outgoing.size].reshape(outgoing.shape)
    silent = (rows == 0).all(axis=1)
    assert 0 < silent.sum() < 6
    # Over many draws the step is the one without dropout, as far as the model is linear behind it.
    draws = [
        trainer.train(exported.weights, one, TrainingConfig(1, 1e-3), np.random.default_rng(seed)).delta
        for seed in range(300)
    ]
    bias = exported.manifest.parameters[3]
    mean = np.mean(draws, axis=0)[bias.offset :]
    expected = trained_from(undropped, plain.weights, one, TrainingConfig(1, 1e-3))[bias.offset :]
    np.testing.assert_allclose(mean, expected, rtol=0.2)


def test_two_classes_share_a_logit() -> None:
    model, exported, trainer = made(1, 2, loss="binary_crossentropy")
    x = inputs(64)
    y = (x[:, 0] > 0).astype(np.int32)
    examples = Examples("signs", x, y)
    update = trainer.train(exported.weights, examples, TrainingConfig(20, 0.3), np.random.default_rng(0))
    assert update.accuracy > 0.95
    probabilities = trainer.predict(exported.weights, x)
    np.testing.assert_allclose(probabilities[:, 1:], tf.sigmoid(model(x)), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
    found = trainer.evaluate(exported.weights, examples)
    loss = tf.keras.losses.BinaryCrossentropy(from_logits=True)(y[:, None], model(x))
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.confusion.sum() == found.example_count == 64


def test_several_labels_are_judged_one_by_one() -> None:
    model, exported, trainer = made(3, 3, loss="multi_label_crossentropy")
    x = inputs(64)
    y = (x[:, :3] > 0).astype(np.float32)
    examples = Examples("signs", x, y)
    update = trainer.train(exported.weights, examples, TrainingConfig(40, 0.5), np.random.default_rng(0))
    assert update.accuracy > 0.9
    found = trainer.evaluate(exported.weights, examples)
    assert found.accuracy == pytest.approx(float(((model(x).numpy() > 0) == (y > 0)).mean()))
    assert found.confusion.shape == (2, 2)
    assert (found.confusion.sum(), found.example_count) == (192, 64)
    with pytest.raises(ExamplesRejected, match="0 to 1"):
        trainer.evaluate(exported.weights, Examples("odd", x, y + 0.5 + y))


@pytest.mark.parametrize("loss", ["mean_squared_error", "huber"])
def test_values_are_learnt_scaled_and_told_raw(loss: Any) -> None:
    target = TargetSpec(shape=(2,), dtype="float32", mean=(20.0, 1000.0), std=(5.0, 30.0))
    model, exported, trainer = made(2, 2, loss=loss, target=target)
    x = inputs(64)
    y = (x[:, :2] * [5.0, 30.0] + [20.0, 1000.0]).astype(np.float32)
    examples = Examples("weather", x, y)
    update = trainer.train(exported.weights, examples, TrainingConfig(40, 0.2), np.random.default_rng(0))
    assert update.accuracy > 0.9
    np.testing.assert_allclose(
        trainer.predict(exported.weights, x), model(x).numpy() * [5.0, 30.0] + [20.0, 1000.0], rtol=1e-5
    )
    stock = tf.keras.losses.get(loss)(((y - [20.0, 1000.0]) / [5.0, 30.0]).astype(np.float32), model(x))
    assert trainer.evaluate(exported.weights, examples).loss == pytest.approx(float(np.mean(stock)), rel=1e-5)
    with pytest.raises(ExamplesRejected, match="targets are int32"):
        trainer.evaluate(exported.weights, Examples("classes", x, np.zeros(64, np.int32)))


def test_ids_beyond_the_vocabulary_never_reach_the_graph() -> None:
    tf.keras.backend.clear_session()
    model = tf.keras.Sequential(
        [layers.Input((6,)), layers.Embedding(9, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    )
    exported = export(
        model,
        name="words",
        labels=["a", "b", "c"],
        scaling=InputSpec(shape=(6,), mean=(0.0,) * 6, std=(1.0,) * 6),
        train_batch_size=BATCH,
    )
    assert exported.manifest.input.vocabulary == 9
    trainer = TfliteTrainer(exported.manifest, exported.graph)
    ids = np.random.default_rng(0).integers(0, 9, (60, 6)).astype(np.float32)
    examples = Examples("words", ids, (ids[:, 0] % 3).astype(np.int32))
    update = trainer.train(exported.weights, examples, TrainingConfig(5, 0.1), np.random.default_rng(0))
    assert update.loss_after < update.loss_before
    for wrong in (-1.0, 9.0):
        with pytest.raises(ExamplesRejected, match="id"):
            trainer.predict(exported.weights, np.full((1, 6), wrong, np.float32))
