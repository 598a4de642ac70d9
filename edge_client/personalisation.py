"""Fine-tuning a version on this device's own examples, and whether that made it better. Pure.

The result stays on the device beside the version that it was made of, and counts for that version only. It is
judged on later examples than it was trained on, since that is how it will be used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from edge_client.training import Evaluation, Examples, ExamplesRejected, LocalTrainer, TrainingConfig
from models.manifest import ModelManifest
from protocol.fields import Sha256, Slug

MINIMUM_HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class PersonalConfig:
    """How to fine-tune.

    Attributes:
        epochs: passes over the examples that are not held out, at least 1. The default is where the held-out
            accuracy of the watch data stops to rise (`benchmarks/personalisation.py`).
        learning_rate: step size of the model's optimizer, over 0.
        held_out: share of the examples, the latest ones, that only judge.
        gap: examples around the held-out ones that are neither trained on nor judge: as many as overlap. A
            window that starts in the middle of the one before overlaps with one on either side.
    """

    epochs: int = 20
    learning_rate: float = 0.1
    held_out: float = 0.3
    gap: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: a value is out of range.
        """
        TrainingConfig(self.epochs, self.learning_rate)
        if not (0.0 < self.held_out < 1.0 and self.gap >= 0):
            raise ValueError(f"held_out is {self.held_out} and gap {self.gap}: need 0 to 1, and at least 0")


class PersonalRecord(BaseModel):
    """What came of it.

    Attributes:
        manifest_sha256: the version that was fine-tuned.
        trained_on: number of examples.
        held_out: number of later examples, on which both are judged.
        kept: whether the device answers with it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    model: Slug
    version: Annotated[int, Field(ge=1)]
    manifest_sha256: Sha256
    epochs: Annotated[int, Field(ge=1)]
    trained_on: Annotated[int, Field(ge=1)]
    held_out: Annotated[int, Field(ge=1)]
    global_accuracy: float
    global_loss: float
    personal_accuracy: float
    personal_loss: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Personal:
    """A record, and all parameters of the model where it was better, float32, shape (d + k,)."""

    record: PersonalRecord
    weights: NDArray[np.float32] | None = field(default=None, repr=False)


def split_in_time(examples: Examples, held_out: float, gap: int) -> tuple[Examples, Examples]:
    """Earlier examples to train on, and later ones to judge by.

    The examples are in the order of time, as the files of a device are. Each stretch of one class, and with
    other targets everything, is cut by itself, so that every class is on both sides. No example is on a side
    within `gap` places of one on the other.

    Raises:
        ExamplesRejected: too few on either side: they are few, or not in the order of time.
    """
    y = examples.y
    starts = np.concatenate([[0], np.flatnonzero(y[1:] != y[:-1]) + 1]) if y.ndim == 1 else np.array([0])
    judges = np.zeros(len(y), bool)
    for start, end in zip(starts, [*starts[1:], len(y)], strict=True):
        judges[end - int(held_out * (end - start)) : end] = True
    near = judges.copy()
    for distance in range(1, gap + 1):
        near[distance:] |= judges[:-distance]
        near[:-distance] |= judges[distance:]
    earlier, later = np.flatnonzero(~near), np.flatnonzero(judges)
    if len(later) < MINIMUM_HELD_OUT or len(earlier) < MINIMUM_HELD_OUT:
        raise ExamplesRejected(
            f"{len(earlier)} earlier and {len(later)} later examples of {len(y)} are too few to tell which "
            f"model is better: record at least {MINIMUM_HELD_OUT} for each, in the order of time"
        )
    return _chosen(examples, earlier), _chosen(examples, later)


def _chosen(examples: Examples, places: NDArray[np.int64]) -> Examples:
    return Examples(examples.name, examples.x[places], examples.y[places])


def better(personal: Evaluation, shared: Evaluation) -> bool:
    """Whether the personal model is to be used: more accurate, or as accurate with a lower loss."""
    return (personal.accuracy, -personal.loss) > (shared.accuracy, -shared.loss)


def personalise(
    trainer: LocalTrainer,
    manifest: ModelManifest,
    weights: NDArray[np.float32],
    local: NDArray[np.float32] | None,
    examples: Examples,
    config: PersonalConfig,
) -> Personal:
    """Fine-tune a version, and hold it against the version as it is, on later examples.

    Args:
        trainer: of the version's graph.
        manifest: of the version.
        weights: its shared parameters; not changed.
        local: the device's local parameters, where the model has such and a round has trained them.
        examples: the device's own, in the order of time.
        config: how.

    Raises:
        TrainingError: the examples do not do, or training diverged: the device stays on the version.
    """
    earlier, later = split_in_time(examples, config.held_out, config.gap)
    training = TrainingConfig(config.epochs, config.learning_rate)
    shared = trainer.evaluate(weights, later, local)
    update = trainer.train(weights, earlier, training, training.generator(), local)
    tuned = weights + update.delta
    personal = trainer.evaluate(tuned, later, update.local)
    record = PersonalRecord(
        model=manifest.name,
        version=manifest.version,
        manifest_sha256=manifest.sha256(),
        epochs=config.epochs,
        trained_on=len(earlier),
        held_out=len(later),
        global_accuracy=shared.accuracy,
        global_loss=shared.loss,
        personal_accuracy=personal.accuracy,
        personal_loss=personal.loss,
        kept=better(personal, shared),
    )
    if not record.kept:
        return Personal(record)
    return Personal(record, tuned if update.local is None else np.concatenate([tuned, update.local]))
