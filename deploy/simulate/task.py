"""What an engine is given, and what it gives back after every round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.optimizers import Server, ServerOptimizer
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.selection import select
from models.examples import Examples
from models.manifest import ModelManifest
from models.zoo import BundledModel
from protocol.dp.events import DPEvent
from protocol.plan import TrainingParameters


@dataclass(frozen=True, eq=False)
class Task:
    """One campaign on simulated devices.

    Attributes:
        source: where its Keras form is: a name of Covey's own, or FILE.py:NAME.
        model: manifest, graph and starting weights.
        devices: examples of each.
        settings: of the campaign.
        training: of each device.
        rounds: how many.
        server: the server's optimizer.
        optimizer: the same, ready to use.
        seed: of the order of examples and of all noise. Noise from a known seed protects nothing: it is the
            same in every repetition, and no result of a simulation is private.
    """

    source: str
    model: BundledModel
    devices: tuple[Examples, ...]
    settings: CampaignSettings
    training: TrainingParameters
    rounds: int
    server: Server
    optimizer: ServerOptimizer
    seed: int

    @property
    def manifest(self) -> ModelManifest:
        """Of the model."""
        return self.model.manifest

    def cohort(self, number: int) -> tuple[int, ...]:
        """Indices of the devices of round `number`, from 1: drawn as the service draws them."""
        names = {f"{index:06d}": index for index in range(len(self.devices))}
        drawn = select(names, self.settings.cohort.size, self.settings.round_seed(number))
        return tuple(names[name] for name in drawn)


def order_seed(seed: int, number: int, device: int) -> list[int]:
    """Seeds the generator of one device's order of examples in one round: the same in both engines."""
    return [seed, number, device]


@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """One round.

    Attributes:
        weights: of the version that it made, float32, shape (d,).
        event: what it would have spent; None where the engine's noise is no integer noise of ours.
        refused: updates that were not finite, which a device never sends.
        seconds: how long it took.
    """

    weights: NDArray[np.float32]
    event: DPEvent | None
    refused: int
    seconds: float
