"""The watch recipe does what it says on two left-out people: all ten are `benchmarks/training.py --folds`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import TrainingConfig
from models import zoo
from models.datasets import watch
from models.recipes import RECIPES, WATCH
from protocol.dp.clipping import clip


def test_every_bundled_model_has_a_recipe() -> None:
    assert set(RECIPES) == set(zoo.NAMES)


@pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="seglearn is absent")
@pytest.mark.parametrize("left_out", [0, 7])
def test_people_who_train_together_beat_people_who_train_alone(left_out: int) -> None:
    people = watch.load()
    test = people.pop(left_out)
    model = zoo.load("watch")
    trainer = TfliteTrainer(model.manifest, model.graph)
    random = np.random.default_rng(left_out)
    config = TrainingConfig(WATCH.local_epochs, WATCH.learning_rate, WATCH.proximal_mu)
    weights = model.weights
    for _ in range(WATCH.rounds):
        updates = [trainer.train(weights, person, config, random).delta for person in people]
        weights = weights + np.mean([clip(update, WATCH.clip_norm) for update in updates], axis=0)
    federated = trainer.evaluate(weights, test).accuracy

    same_budget = TrainingConfig(WATCH.rounds * WATCH.local_epochs, WATCH.learning_rate)
    own = [model.weights + trainer.train(model.weights, one, same_budget, random).delta for one in people]
    alone = float(np.mean([trainer.evaluate(weights, test).accuracy for weights in own]))
    assert federated > alone + 0.1
    assert federated > 0.78
