"""Training with a real interpreter, in whichever small runtime this Python has; needs no TensorFlow."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import (
    Examples,
    ExamplesRejected,
    LocalTrainer,
    ModelRejected,
    TrainingConfig,
    TrainingDiverged,
    WeightsRejected,
)
from models import zoo
from models.manifest import ModelManifest, SignatureSpec, describe

CONFIG = TrainingConfig(local_epochs=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def watch() -> zoo.BundledModel:
    return zoo.load("watch")


@pytest.fixture(scope="module")
def trainer(watch: zoo.BundledModel) -> TfliteTrainer:
    return TfliteTrainer(watch.manifest, watch.graph)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def waves(count: int, seed: int = 0) -> Examples:
    """Windows whose class is how fast they swing: easy to learn, unlike noise."""
    random = generator(seed)
    y = random.integers(0, 7, count).astype(np.int32)
    time = np.arange(100) / 50
    phase = random.uniform(0, 2 * np.pi, (count, 1))
    swing = np.sin(2 * np.pi * (0.5 + y[:, None]) * time + phase)
    x = swing[:, :, None] * np.array([1.0, 0.5, 0.5, 1.0, 2.5, 1.0]) + 0.1 * random.normal(
        size=(count, 100, 6)
    )
    return Examples("waves", x.astype(np.float32), y)


def altered(manifest: ModelManifest, **changes: Any) -> ModelManifest:
    return ModelManifest.model_validate(dict(manifest) | changes)


def test_training_runs_with_the_fast_kernels_of_the_runtime() -> None:
    """Without them a step takes two to twelve times as long; the runtime says on stderr that it has them."""
    code = """if True:
        from edge_client.adapters.tflite import TfliteTrainer
        from models import zoo

        model = zoo.load("watch")
        TfliteTrainer(model.manifest, model.graph)
    """
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert "XNNPACK delegate" in child.stderr


def test_training_lowers_the_loss_and_leaves_the_weights_given(
    trainer: LocalTrainer, watch: zoo.BundledModel
) -> None:
    weights = watch.weights.copy()
    examples = waves(200)
    update = trainer.train(weights, examples, TrainingConfig(20, 0.1), generator())
    assert np.array_equal(weights, watch.weights)
    assert update.delta.shape == (trainer.parameter_count,)
    assert update.delta.dtype == np.float32
    assert update.example_count == 200
    assert update.loss_after < 0.5 * update.loss_before
    after = trainer.evaluate(weights + update.delta, examples)
    assert update.accuracy == pytest.approx(after.accuracy, abs=0.02)
    assert trainer.evaluate(weights + update.delta, waves(200, seed=1)).accuracy > 0.6


def test_the_generator_alone_decides_the_order(trainer: LocalTrainer, watch: zoo.BundledModel) -> None:
    examples = waves(100)
    first = trainer.train(watch.weights, examples, CONFIG, generator(1)).delta
    again = trainer.train(watch.weights, examples, CONFIG, generator(1)).delta
    other = trainer.train(watch.weights, examples, CONFIG, generator(2)).delta
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_trainer_remembers_nothing_of_an_earlier_training(
    trainer: LocalTrainer, watch: zoo.BundledModel
) -> None:
    fresh = TfliteTrainer(watch.manifest, watch.graph).train(watch.weights, waves(40), CONFIG, generator())
    trainer.train(watch.weights + np.float32(0.1), waves(70, seed=3), CONFIG, generator())
    used = trainer.train(watch.weights, waves(40), CONFIG, generator())
    assert np.array_equal(fresh.delta, used.delta)


@pytest.mark.parametrize("count", [1, 5, 31])
def test_a_partial_batch_is_weighted_exactly(
    trainer: LocalTrainer, watch: zoo.BundledModel, count: int
) -> None:
    """One step on n examples is one step on the mean of the n steps on each alone."""
    examples = waves(count)
    config = TrainingConfig(local_epochs=1, learning_rate=0.05)
    together = trainer.train(watch.weights, examples, config, generator()).delta
    alone = [
        trainer.train(
            watch.weights, Examples("one", examples.x[i : i + 1], examples.y[i : i + 1]), config, generator()
        ).delta
        for i in range(count)
    ]
    np.testing.assert_allclose(together, np.mean(alone, axis=0), atol=2e-6)


def test_the_last_batch_is_a_step_of_its_own(trainer: LocalTrainer, watch: zoo.BundledModel) -> None:
    """Equal examples make order and batch size irrelevant: 33 of them are two full steps."""
    one = waves(1)
    config = TrainingConfig(local_epochs=1, learning_rate=0.05)
    many = Examples("many", np.repeat(one.x, 33, axis=0), np.repeat(one.y, 33))
    two_epochs = trainer.train(watch.weights, one, TrainingConfig(2, 0.05), generator()).delta
    np.testing.assert_allclose(
        trainer.train(watch.weights, many, config, generator()).delta, two_epochs, atol=2e-6
    )


def test_the_proximal_term_pulls_towards_the_global_weights(
    trainer: LocalTrainer, watch: zoo.BundledModel
) -> None:
    """By hand for two steps on one example: the second moves by -lr (g + mu d), d the first one's delta."""
    one, lr, mu = waves(1), 0.05, 2.0
    first = trainer.train(watch.weights, one, TrainingConfig(1, lr, mu), generator()).delta
    plain_first = trainer.train(watch.weights, one, TrainingConfig(1, lr), generator()).delta
    np.testing.assert_allclose(first, plain_first, atol=1e-7)
    plain_second = trainer.train(watch.weights, one, TrainingConfig(2, lr), generator()).delta
    second = trainer.train(watch.weights, one, TrainingConfig(2, lr, mu), generator()).delta
    np.testing.assert_allclose(second, plain_second - lr * mu * first, atol=1e-6)
    examples = waves(300)
    free = trainer.train(watch.weights, examples, TrainingConfig(5, lr), generator())
    pulled = trainer.train(watch.weights, examples, TrainingConfig(5, lr, mu), generator())
    assert pulled.l2_norm < 0.8 * free.l2_norm


@pytest.mark.parametrize("learning_rate", [1e3, 1e20, 1e38])
def test_a_diverged_training_is_refused_and_the_trainer_lives_on(
    trainer: LocalTrainer, watch: zoo.BundledModel, learning_rate: float
) -> None:
    """Also where the runtime hides infinities behind the largest finite number."""
    with pytest.raises(TrainingDiverged):
        trainer.train(watch.weights, waves(64), TrainingConfig(5, learning_rate), generator())
    assert np.isfinite(trainer.train(watch.weights, waves(64), CONFIG, generator()).delta).all()


def test_probabilities_and_evaluation_agree(trainer: LocalTrainer, watch: zoo.BundledModel) -> None:
    examples = waves(600)
    probabilities = trainer.predict(watch.weights, examples.x)
    assert probabilities.shape == (600, 7)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    evaluation = trainer.evaluate(watch.weights, examples)
    predicted = probabilities.argmax(axis=1)
    assert evaluation.accuracy == pytest.approx((predicted == examples.y).mean())
    assert evaluation.loss == pytest.approx(
        -np.log(probabilities[np.arange(600), examples.y].astype(np.float64)).mean(), rel=1e-4
    )
    assert evaluation.example_count == 600
    assert evaluation.confusion[2, 3] == ((examples.y == 2) & (predicted == 3)).sum()
    np.testing.assert_allclose(trainer.predict(watch.weights, examples.x[:1]), probabilities[:1], atol=1e-5)


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros(10, np.float32),
        np.zeros((1, 1831), np.float32),
        np.zeros(1831, np.float64),
        np.full(1831, np.nan, np.float32),
    ],
)
def test_weights_that_do_not_fit_are_refused(trainer: LocalTrainer, weights: NDArray[Any]) -> None:
    with pytest.raises(WeightsRejected):
        trainer.train(weights, waves(10), CONFIG, generator())
    with pytest.raises(WeightsRejected):
        trainer.predict(weights, waves(10).x)


def test_examples_that_do_not_fit_are_refused(trainer: LocalTrainer, watch: zoo.BundledModel) -> None:
    x, y = waves(4).x, np.zeros(4, np.int32)
    for wrong in (
        Examples("short", x[:, :50], y),
        Examples("none", x[:0], y[:0]),
        Examples("beyond", x, np.full(4, 7, np.int32)),
    ):
        with pytest.raises(ExamplesRejected):
            trainer.train(watch.weights, wrong, CONFIG, generator())
        with pytest.raises(ExamplesRejected):
            trainer.evaluate(watch.weights, wrong)
    with pytest.raises(ExamplesRejected, match="finite"):
        trainer.predict(watch.weights, np.full((1, 100, 6), np.inf, np.float32))
    with pytest.raises(ExamplesRejected):
        trainer.predict(watch.weights, x.astype(np.float64))


def test_a_model_file_that_is_not_its_manifests_is_refused(watch: zoo.BundledModel) -> None:
    manifest, graph = watch.manifest, watch.graph
    text = b"#!/bin/sh\n" + b" " * 100
    digits = zoo.load("digits")
    cases = {
        "bytes": (manifest, graph[:-1]),
        "digest": (manifest, graph[:-1] + bytes([graph[-1] ^ 1])),
        "flatbuffer": (altered(manifest, graph=describe(text)), text),
        "shape": (altered(manifest, graph=describe(digits.graph)), digits.graph),
        "batch": (altered(manifest, train_batch_size=16), graph),
    }
    for name, (claimed, file) in cases.items():
        with pytest.raises(ModelRejected):
            TfliteTrainer(claimed, file)
            pytest.fail(f"{name} was accepted")


def test_signatures_other_than_the_manifests_are_refused(watch: zoo.BundledModel) -> None:
    extra = SignatureSpec(name="leak", inputs=(), outputs=("x",))
    with pytest.raises(ModelRejected, match="leak"):
        TfliteTrainer(altered(watch.manifest, signatures=(*watch.manifest.signatures, extra)), watch.graph)
    others = tuple(s for s in watch.manifest.signatures if s.name != "infer")
    renamed = (*others, SignatureSpec(name="infer", inputs=("image",), outputs=("logits",)))
    with pytest.raises(ModelRejected, match="infer"):
        TfliteTrainer(altered(watch.manifest, signatures=renamed), watch.graph)


def test_digits_model_trains() -> None:
    bundled = zoo.load("digits")
    trainer = TfliteTrainer(bundled.manifest, bundled.graph)
    random = generator()
    patterns = random.uniform(0, 16, (10, 8, 8, 1))
    y = random.integers(0, 10, 200).astype(np.int32)
    x = np.clip(patterns[y] + random.normal(size=(200, 8, 8, 1)), 0, 16).astype(np.float32)
    update = trainer.train(bundled.weights, Examples("form", x, y), TrainingConfig(10, 0.1), generator())
    assert update.accuracy > 0.9


DEVICE = """
import pathlib, sys
import numpy as np
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import zoo
model = zoo.load("watch")
trainer = TfliteTrainer(model.manifest, model.graph)
random = np.random.default_rng(0)
x = random.normal(size=(500, 100, 6)).astype(np.float32)
examples = Examples("p", x, random.integers(0, 7, 500).astype(np.int32))
trainer.train(model.weights, examples, TrainingConfig(1, 0.01), random)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"tensorflow", "keras", "sklearn", "seglearn", "aggregator"}, loaded
# Not getrusage: its maximum counts the parent that this process was forked from.
status = pathlib.Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) // 1024)
"""


def test_a_device_needs_no_tensorflow_and_little_memory() -> None:
    run = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    # ai-edge-litert itself takes about 20 MiB more than tflite-runtime.
    limit = 80 if "tflite_runtime" in TfliteTrainer.runtime else 100
    assert int(run.stdout) <= limit, "MiB at the peak"
