"""One of Covey's own models: how it is built, and what its manifest says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from models.export import ExportedModel, export
from models.manifest import InputSpec, LossName, OptimizerSpec, TargetSpec

INITIAL_WEIGHTS_SEED = 7


@dataclass(frozen=True)
class Architecture:
    """A Keras model with what the exporter needs to know.

    Attributes:
        name: slug.
        build: makes the Keras model, with initial weights from TensorFlow's global seed.
        labels: class names.
        scaling: raw input and its constants.
        train_batch_size: examples in one training step.
        loss: what training lowers.
        target: scaling of predicted values; None where the loss has none.
        optimizer: what a step does with a gradient.
        accumulation: calls of `train` that make one step.
        local_layers: names of layers whose weights stay on each device.
        example_gradients: whether devices may train it in privacy mode example.
    """

    name: str
    build: Callable[[], Any]
    labels: tuple[str, ...]
    scaling: InputSpec
    train_batch_size: int = 32
    loss: LossName = "sparse_categorical_crossentropy"
    target: TargetSpec | None = None
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    accumulation: int = 1
    local_layers: tuple[str, ...] = ()
    example_gradients: bool = False

    def build_seeded(self) -> Any:
        """The Keras model with the same initial weights every time."""
        tf.keras.backend.clear_session()
        tf.keras.utils.set_random_seed(INITIAL_WEIGHTS_SEED)
        return self.build()

    def export(self) -> ExportedModel:
        """Version 1 of the model."""
        return export(
            self.build_seeded(),
            name=self.name,
            labels=self.labels,
            scaling=self.scaling,
            train_batch_size=self.train_batch_size,
            loss=self.loss,
            target=self.target,
            optimizer=OptimizerSpec(kind=self.optimizer),
            accumulation=self.accumulation,
            local_layers=self.local_layers,
            example_gradients=self.example_gradients,
        )
