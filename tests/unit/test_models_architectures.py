"""Every architecture exports within its size, and learns a tiny made-up task in the small runtime."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import graph_file
from models.architectures import ARCHITECTURES, anomaly, forecast, gestures, keywords, pictures
from models.network import Network

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Random = np.random.Generator


def words(random: Random, count: int) -> Examples:
    """Each word has its own pattern of frames and coefficients."""
    y = random.integers(0, len(keywords.LABELS), count).astype(np.int32)
    patterns = np.random.default_rng(1).normal(size=(len(keywords.LABELS), 7, 10)).repeat(7, axis=1)
    x = 10 * (patterns[y] + 0.3 * random.normal(size=(count, 49, 10)))
    return Examples("words", x.astype(np.float32), y)


def colours(random: Random, count: int) -> Examples:
    """Pictures of one colour each; a random backbone makes more noise than this into anything."""
    y = random.integers(0, 4, count).astype(np.int32)
    base = np.array([[40, 40, 40], [220, 60, 60], [60, 220, 60], [60, 60, 220]], np.float32)
    x = base[y][:, None, None, :] + random.normal(size=(count, 96, 96, 3))
    return Examples("colours", np.clip(x, 0, 255).astype(np.float32), y)


def machine(random: Random, count: int) -> Examples:
    """Eight readings of what only three things cause."""
    causes = np.random.default_rng(1).normal(size=(3, 8)) / 2
    x = (random.normal(size=(count, 3)) @ causes + 0.02 * random.normal(size=(count, 8))).astype(np.float32)
    return Examples("machine", x, x.copy())


def weather(random: Random, count: int) -> Examples:
    """Slow waves, of which the next value follows from the last ones."""
    start = random.uniform(0, 2 * np.pi, (count, 1, 1))
    time = np.arange(forecast.STEPS + 1)[None, :, None] * np.array([0.3, 0.4, 0.5])
    values = (np.sin(start + time) * forecast.DEVIATIONS + forecast.MEANS).astype(np.float32)
    return Examples("weather", values[:, :-1], values[:, -1])


def motions(random: Random, count: int) -> Examples:
    """Gestures that differ by how fast they swing."""
    y = random.integers(0, len(gestures.LABELS), count).astype(np.int32)
    time = np.arange(gestures.SAMPLES)[None, :] * (0.1 + 0.2 * y[:, None])
    swing = np.sin(time + random.uniform(0, 2 * np.pi, (count, 1)))
    x = swing[:, :, None] * np.array([1.0, 0.5, -1.0]) + 0.1 * random.normal(size=(count, 64, 3))
    return Examples("motions", x.astype(np.float32), y)


CASES: dict[str, tuple[Callable[[Random, int], Examples], int, TrainingConfig, float]] = {
    "keywords": (words, 256, TrainingConfig(8, 0.01), 0.9),
    "pictures": (colours, 64, TrainingConfig(6, 0.002), 0.9),
    "anomaly": (machine, 512, TrainingConfig(30, 0.01), 0.9),
    "forecast": (weather, 512, TrainingConfig(12, 0.02), 0.9),
    "gestures": (motions, 256, TrainingConfig(12, 0.1), 0.9),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.e2e] if name == "pictures" else []) for name in CASES]
)
def test_architectures_export_within_their_size_and_learn(name: str) -> None:
    make, count, config, wanted = CASES[name]
    exported = ARCHITECTURES[name].export()
    network = Network(ARCHITECTURES[name].build_seeded())
    everything = 4 * (network.parameter_count + network.frozen_count)
    assert len(exported.graph) <= 1.3 * everything + 8192 * network.layer_count
    graph_file.read(exported.graph)
    trainer = TfliteTrainer(exported.manifest, exported.graph)
    random = np.random.default_rng(0)
    examples, others = make(random, count), make(random, 64)
    before = trainer.evaluate(exported.weights, others)
    update = trainer.train(exported.weights, examples, config, random)
    after = trainer.evaluate(exported.weights + update.delta, others)
    assert after.loss < 0.6 * before.loss
    assert after.accuracy > wanted
    print(f"{name}: {before.accuracy:.2f} -> {after.accuracy:.2f}, graph {len(exported.graph):,} bytes")


def test_only_the_head_of_the_picture_model_travels() -> None:
    network = Network(ARCHITECTURES["pictures"].build_seeded())
    assert [parameter.name for parameter in network.parameters] == ["head/kernel", "head/bias"]
    assert network.parameter_count == 1280 * len(pictures.LABELS) + len(pictures.LABELS)
    assert network.frozen_count == 410_208


def test_what_the_anomaly_model_never_saw_it_gives_back_worse() -> None:
    exported = ARCHITECTURES["anomaly"].export()
    trainer = TfliteTrainer(exported.manifest, exported.graph)
    random = np.random.default_rng(0)
    update = trainer.train(exported.weights, machine(random, 512), TrainingConfig(30, 0.01), random)
    weights = exported.weights + update.delta

    def errors(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.asarray(((trainer.predict(weights, x) - x) ** 2).mean(axis=1))

    usual = machine(random, 100).x
    unusual = np.stack([random.permutation(row) for row in usual])
    assert np.median(errors(unusual)) > 5 * np.median(errors(usual))
    assert len(anomaly.LABELS) == usual.shape[1]
