"""DP-SGD with a real interpreter: one example's gradients, and steps that hide every single example."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.adapters.model_check import check_in_child
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import (
    Examples,
    HiddenExamples,
    ModelRejected,
    TrainingConfig,
    TrainingDiverged,
)
from models import zoo
from models.weights import encode_weights
from protocol.dp.example import mechanism_of
from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution
from tests.unit.test_training_tflite import altered, generator, waves


@pytest.fixture(scope="module")
def watch() -> zoo.BundledModel:
    return zoo.load("watch")


@pytest.fixture(scope="module")
def trainer(watch: zoo.BundledModel) -> TfliteTrainer:
    return TfliteTrainer(watch.manifest, watch.graph)


def config(
    watch: zoo.BundledModel, *, z: float, q: float, clip: float, steps: int, lr: float = 0.1, secret: int = 0
) -> TrainingConfig:
    example = ExamplePrivacy(clip_norm=clip, noise_multiplier=z, sampling_probability=q)
    mechanism = mechanism_of(example, NoiseDistribution.SKELLAM, watch.manifest.parameter_count)
    return TrainingConfig(1, lr, hidden=HiddenExamples(mechanism, steps, secret.to_bytes(32, "big")))


def test_the_mean_of_single_gradients_is_the_batchs(watch: zoo.BundledModel) -> None:
    """`train` with one step at rate 1 moves by the mean gradient; `gradient` gives its parts."""
    examples = waves(32)
    trainer = TfliteTrainer(watch.manifest, watch.graph)
    whole = -trainer.train(watch.weights, examples, TrainingConfig(1, 1.0), generator()).delta
    run = trainer._run
    run["set_weights"](weights=watch.weights)
    x = trainer._scale(examples.x)
    parts = [
        run["gradient"](x=x[i : i + 1], y=examples.y[i : i + 1])["gradient"].astype(np.float64)
        for i in range(32)
    ]
    assert np.abs(np.mean(parts, axis=0) - whole).max() < 1e-5 * np.abs(whole).max() + 1e-6


def test_without_clipping_and_next_to_no_noise_a_step_is_gradient_descents(
    trainer: TfliteTrainer, watch: zoo.BundledModel
) -> None:
    examples = waves(32)
    plain = trainer.train(watch.weights, examples, TrainingConfig(1, 0.1), generator()).delta
    one = config(watch, z=0.01, q=1.0, clip=20.0, steps=1)
    hidden = trainer.train(watch.weights, examples, one, generator()).delta
    # The noise of the step: z C lr over the batch in every coordinate; six deviations of it.
    assert np.abs(hidden - plain).max() < 6 * 0.01 * 20.0 * 0.1 / 32


def test_it_learns_and_depends_on_the_secret(trainer: TfliteTrainer, watch: zoo.BundledModel) -> None:
    weights, examples = watch.weights.copy(), waves(200)
    first = config(watch, z=0.5, q=0.2, clip=1.0, steps=60, lr=0.5)
    update = trainer.train(weights, examples, first, generator())
    assert np.array_equal(weights, watch.weights)
    assert update.loss_after < 0.8 * update.loss_before
    again = trainer.train(weights, examples, first, generator())
    other = trainer.train(
        weights, examples, config(watch, z=0.5, q=0.2, clip=1.0, steps=60, lr=0.5, secret=1), generator()
    )
    assert np.array_equal(update.delta, again.delta)
    assert not np.array_equal(update.delta, other.delta)


def test_one_example_moves_a_step_by_no_more_than_its_clip_norm(
    trainer: TfliteTrainer, watch: zoo.BundledModel
) -> None:
    """Same coins, same noise, one example far outside: the whole difference is one clipped gradient."""
    examples = waves(20)
    x: NDArray[np.float32] = examples.x.copy()
    x[7] *= 1e3
    step = config(watch, z=1.0, q=1.0, clip=0.5, steps=1, lr=1.0)
    first = trainer.train(watch.weights, examples, step, generator()).delta.astype(np.float64)
    other = trainer.train(watch.weights, Examples("other", x, examples.y), step, generator()).delta
    moved = float(np.linalg.norm(first - other))
    assert 0.1 / 20 < moved <= 2 * 0.5 / 20 * 1.001


def test_a_diverged_training_is_refused(trainer: TfliteTrainer, watch: zoo.BundledModel) -> None:
    wild = config(watch, z=64.0, q=1.0, clip=1e6, steps=3, lr=100.0)
    with pytest.raises(TrainingDiverged):
        trainer.train(watch.weights, waves(5), wild, generator())


def test_a_graph_without_the_entry_points_says_what_to_do(watch: zoo.BundledModel) -> None:
    fewer = tuple(s for s in watch.manifest.signatures if s.name not in {"gradient", "apply"})
    plain = TfliteTrainer(altered(watch.manifest, signatures=fewer), watch.graph)
    with pytest.raises(ModelRejected, match="example_gradients=True"):
        plain.train(watch.weights, waves(5), config(watch, z=1.0, q=1.0, clip=1.0, steps=1), generator())


def test_the_manifest_must_tell_the_entry_points_truly(watch: zoo.BundledModel) -> None:
    swapped = tuple(replace_inputs(s) if s.name == "gradient" else s for s in watch.manifest.signatures)
    with pytest.raises(ModelRejected, match="other tensors"):
        TfliteTrainer(altered(watch.manifest, signatures=swapped), watch.graph)


def replace_inputs(signature: object) -> object:
    return signature.model_copy(update={"inputs": ("x", "y", "keep")})  # type: ignore[attr-defined]


def test_the_trial_in_the_child_steps_over_single_examples_too(watch: zoo.BundledModel) -> None:
    check_in_child(watch.manifest, watch.graph, encode_weights(watch.weights))
