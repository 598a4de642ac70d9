"""What a plan's task comes to: with the manifest of the version, where one is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from models.manifest import ModelManifest
from protocol.plan import EvaluateTask, QueryTask, Task, TrainTask


@dataclass(frozen=True)
class Training:
    """Train a version.

    Attributes:
        manifest: of the plan's base version; on a device it may be of an older one, where the plan allows it.
    """

    task: TrainTask
    manifest: ModelManifest

    @property
    def staleness(self) -> int:
        """How many versions older than the plan's base version training begins from."""
        return self.task.base_version - self.manifest.version

    @property
    def dimension(self) -> int:
        """Elements of the update."""
        return self.manifest.parameter_count


@dataclass(frozen=True)
class Evaluating:
    """Evaluate a version.

    Attributes:
        manifest: of the plan's version.
    """

    task: EvaluateTask
    manifest: ModelManifest

    @property
    def dimension(self) -> int:
        """Elements of the figures' vector."""
        return self.task.dimension


@dataclass(frozen=True)
class Answering:
    """Answer a query over a declared field."""

    task: QueryTask

    @property
    def dimension(self) -> int:
        """Elements of the answer."""
        return self.task.dimension


Assignment = Training | Evaluating | Answering


def assignment_of(task: Task, manifest: ModelManifest | None) -> Assignment:
    """Puts a task and the manifest that belongs to it together again.

    Raises:
        ValueError: a task about a version, without the manifest of that version.
    """
    if isinstance(task, QueryTask):
        return Answering(task)
    if manifest is None:
        raise ValueError(f"no manifest for {described(task)}")
    if isinstance(task, TrainTask):
        return Training(task, manifest)
    if isinstance(task, EvaluateTask):
        return Evaluating(task, manifest)
    assert_never(task)


def version_of(task: Task) -> tuple[str, int] | None:
    """Model and number of the version that a task is about; None for a query."""
    if isinstance(task, TrainTask):
        return task.model, task.base_version
    if isinstance(task, EvaluateTask):
        return task.model, task.version
    if isinstance(task, QueryTask):
        return None
    assert_never(task)


def described(task: Task) -> str:
    """What a task asks, in a few words."""
    if isinstance(task, TrainTask):
        return f"{task.model} v{task.base_version}"
    if isinstance(task, EvaluateTask):
        return f"evaluation of {task.model} v{task.version}"
    if isinstance(task, QueryTask):
        return f"{task.question.kind} of {task.field}"
    assert_never(task)
