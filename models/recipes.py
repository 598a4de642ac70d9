"""How Covey's own models are trained in a fleet: figures found by experiment. Imports no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a federated run of one model.

    Attributes:
        rounds: rounds from version 1.
        local_epochs: passes of each device over its examples in a round.
        learning_rate: of the device's plain stochastic gradient descent.
        clip_norm: L2 bound C of one update; every device weighs 1.
        proximal_mu: weight of the FedProx term, 0 for none.
    """

    rounds: int
    local_epochs: int
    learning_rate: float
    clip_norm: float
    proximal_mu: float = 0.0


WATCH = Recipe(rounds=12, local_epochs=4, learning_rate=0.1, clip_norm=3.0)
DIGITS = Recipe(rounds=10, local_epochs=4, learning_rate=0.1, clip_norm=3.0)
RECIPES: dict[str, Recipe] = {"watch": WATCH, "digits": DIGITS}
