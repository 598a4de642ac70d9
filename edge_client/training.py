"""Local training as the device's core sees it: values, errors, and the protocol that a trainer fulfils.

Pure: no interpreter, no files, no clock. The one implementation is `edge_client.adapters.tflite`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.examples import Examples
from protocol.dp.example import ExampleMechanism

__all__ = [
    "MAX_WEIGHT",
    "Evaluation",
    "Examples",
    "ExamplesRejected",
    "HiddenExamples",
    "LocalTrainer",
    "LocalUpdate",
    "ModelRejected",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingError",
    "WeightsRejected",
]


MAX_WEIGHT = 1e6
"""Largest magnitude of a trained weight. tflite-runtime 2.14 turns infinities and NaN into the largest
float32, so that a diverged training can end with absurd but finite weights."""


class TrainingError(Exception):
    """Local training, or a prediction, did not happen."""


class ModelRejected(TrainingError):
    """A model file that is not what its manifest says, or that the runtime cannot run."""


class WeightsRejected(TrainingError):
    """Weights of another length or dtype than the model's, or not finite."""


class ExamplesRejected(TrainingError):
    """Examples that the model cannot be given: none, another shape, or a target that it does not have."""


class TrainingDiverged(TrainingError):
    """Training diverged: a loss or weight is not finite, or a weight is beyond `MAX_WEIGHT`: no update."""


@dataclass(frozen=True, slots=True)
class HiddenExamples:
    """Training by DP-SGD, which hides every single example (`protocol.dp.example`).

    Attributes:
        mechanism: clip norm, noise and sampling.
        steps: of one round.
        secret: 32 fresh bytes of coins and noise, for this training only.
    """

    mechanism: ExampleMechanism
    steps: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Hyperparameters of one round's local training; batch size and optimizer are the model's.

    Attributes:
        local_epochs: passes over the device's examples, at least 1.
        learning_rate: step size of the model's optimizer, over 0.
        proximal_mu: weight of the FedProx term (Li et al. 2020, arXiv 1812.06127); 0 is FedAvg.
        seed: of the order of examples, for callers that bring no generator of their own.
        hidden: DP-SGD in place of the epochs; None for plain training.
    """

    local_epochs: int
    learning_rate: float
    proximal_mu: float = 0.0
    seed: int = 0
    hidden: HiddenExamples | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ValueError: a value is out of range or not finite.
        """
        if self.local_epochs < 1:
            raise ValueError(f"local_epochs is {self.local_epochs}, must be at least 1")
        if not (np.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}, must be finite and over 0")
        if not (np.isfinite(self.proximal_mu) and self.proximal_mu >= 0):
            raise ValueError(f"proximal_mu is {self.proximal_mu}, must be finite and at least 0")

    def generator(self) -> np.random.Generator:
        """A new generator from `seed`: the same order of examples every time."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How weights do on labelled examples.

    Attributes:
        loss: mean loss, the one that the model is trained to lower; cross-entropies are in nats.
        accuracy: share of examples whose most likely class is the true one; with several labels, share of
            labels that are right; for values, share of their variance that is explained, at least 0.
        confusion: int64 (classes, classes); rows are true classes, columns predicted ones. With several
            labels (2, 2) over all of them; for values (0, 0).
        example_count: number of examples.
    """

    loss: float
    accuracy: float
    confusion: NDArray[np.int64]
    example_count: int


@dataclass(frozen=True, slots=True, eq=False)
class LocalUpdate:
    """What one device's training gives, before clipping, noise and masking. It never leaves the device as is.

    Attributes:
        delta: local minus global shared parameters, finite float32, shape (d,): all that is ever sent.
        example_count: examples trained on.
        loss_before: mean loss on them under the global weights.
        loss_after: mean loss on them under the local weights.
        accuracy: share of them that the local weights get right, as in `Evaluation`.
        local: the model's local parameters after training, finite float32, shape (k,), which stay on the
            device; None where it has none.
    """

    delta: NDArray[np.float32]
    example_count: int
    loss_before: float
    loss_after: float
    accuracy: float
    local: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def l2_norm(self) -> float:
        """L2 norm of the delta: what the clip norm is compared with."""
        return float(np.linalg.norm(self.delta.astype(np.float64)))


class LocalTrainer(Protocol):
    """Trains and runs one model graph; weights are always passed in, and nothing of a round is remembered.

    `local` are the device's own parameters of a model that has such, float32, shape (k,). None stands for
    those that the model starts from.
    """

    @property
    def parameter_count(self) -> int:
        """Length d of the weights vector."""
        ...

    def train(
        self,
        weights: NDArray[np.float32],
        examples: Examples,
        config: TrainingConfig,
        generator: np.random.Generator,
        local: NDArray[np.float32] | None = None,
    ) -> LocalUpdate:
        """Train on the device's examples from the global weights.

        Args:
            weights: global parameters, float32, shape (d,); not changed.
            examples: raw inputs and labels.
            config: hyperparameters.
            generator: decides the order of examples and what dropout drops, and nothing else does.
            local: the device's own parameters; trained together with the shared ones, and not changed here.

        Raises:
            WeightsRejected: the weights do not fit the model.
            ExamplesRejected: the examples do not fit the model.
            TrainingDiverged: training diverged.
        """
        ...

    def predict(
        self,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        local: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Probabilities or values (n, labels), float32, of raw inputs x (n, *example shape).

        Raises:
            WeightsRejected: the weights do not fit the model.
            ExamplesRejected: the inputs do not fit the model.
        """
        ...

    def evaluate(
        self,
        weights: NDArray[np.float32],
        examples: Examples,
        local: NDArray[np.float32] | None = None,
    ) -> Evaluation:
        """Loss, accuracy and confusion on labelled examples.

        Raises:
            WeightsRejected: the weights do not fit the model.
            ExamplesRejected: the examples do not fit the model.
        """
        ...
