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


WATCH = Recipe(rounds=10, local_epochs=3, learning_rate=0.2, clip_norm=1.5)
"""Mean accuracy over ten left-out people 0.83; alone 0.63, pooled 0.85 (`benchmarks/training.py --folds`).

The L2 norm of an update is 3.0 in the first round, 1.9 in the third and 1.0 in the last, so that the clip
norm acts in the first half of a run. Noise on the mean of nine updates with a standard deviation of
C / 2 sqrt(d) a coordinate (d parameters) costs nothing that can be measured, C / sqrt(d) a point and a half.
"""

DIGITS = Recipe(rounds=10, local_epochs=4, learning_rate=0.2, clip_norm=3.0)
"""Mean accuracy over seven left-out forms 0.91; alone 0.71, pooled 0.96."""

RECIPES: dict[str, Recipe] = {"watch": WATCH, "digits": DIGITS}
