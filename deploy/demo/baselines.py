"""What federating is compared with: each device alone, and all data in one place.

Same graph, same starting weights, and the same budget: as many passes over a device's examples as its part in
the federation took.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Evaluation, Examples, TrainingConfig
from models.recipes import Recipe
from models.zoo import BundledModel


@dataclass(frozen=True, slots=True)
class Baselines:
    """Accuracy on each held-out person, by the person's name.

    Attributes:
        local: mean over the devices, each trained alone.
        central: one model trained on everybody's data.
    """

    local: dict[str, float]
    central: dict[str, float]


def train_centrally(
    model: BundledModel, examples: Examples, recipe: Recipe, epochs: int, seed: int
) -> NDArray[np.float32]:
    """Trains version 1 of `model` on `examples` for `epochs` passes; returns the weights, float32 (d,)."""
    trainer = TfliteTrainer(model.manifest, model.graph)
    config = TrainingConfig(local_epochs=epochs, learning_rate=recipe.learning_rate)
    update = trainer.train(model.weights, examples, config, np.random.default_rng(seed))
    return model.weights + update.delta


def run_baselines(
    model: BundledModel,
    devices: Sequence[Examples],
    held_out: Sequence[Examples],
    recipe: Recipe,
    *,
    rounds: int,
    seed: int,
    done: Callable[[str], None] = lambda name: None,
) -> Baselines:
    """Trains every baseline, as many at a time as there are cores.

    Args:
        model: version 1.
        devices: examples of each device that took part.
        held_out: examples of the people nobody trained on.
        recipe: hyperparameters, the federation's own.
        rounds: rounds that the federation ran.
        seed: of the order of examples.
        done: called with a name whenever one is trained.
    """
    epochs = rounds * recipe.local_epochs

    def accuracies(name: str, examples: Examples) -> list[float]:
        # Invoking the interpreter releases the interpreter lock, so threads do use the cores.
        weights = train_centrally(model, examples, recipe, epochs, seed)
        trainer = TfliteTrainer(model.manifest, model.graph)
        found = [trainer.evaluate(weights, person).accuracy for person in held_out]
        done(name)
        return found

    pooled = Examples.pooled("everybody", list(devices))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        central = pool.submit(accuracies, "everybody", pooled)  # the longest first
        local = [pool.submit(accuracies, device.name, device) for device in devices]
        alone = np.mean([future.result() for future in local], axis=0)
        together = central.result()
    names = [person.name for person in held_out]
    return Baselines(
        local={name: float(value) for name, value in zip(names, alone, strict=True)},
        central=dict(zip(names, together, strict=True)),
    )


def evaluate(
    model: BundledModel, weights: NDArray[np.float32], people: Sequence[Examples]
) -> list[Evaluation]:
    """How these weights do on each person."""
    trainer = TfliteTrainer(model.manifest, model.graph)
    return [trainer.evaluate(weights, person) for person in people]
