"""What a plan's task means on this device: with the manifest of the version, where one is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from models.manifest import ModelManifest
from protocol.plan import QueryTask, Task, TrainTask


@dataclass(frozen=True)
class Training:
    """Train a version that this device knows.

    Attributes:
        manifest: of the plan's base version.
    """

    task: TrainTask
    manifest: ModelManifest

    @property
    def dimension(self) -> int:
        """Elements of the update."""
        return self.manifest.parameter_count


@dataclass(frozen=True)
class Answering:
    """Answer a query over a declared field."""

    task: QueryTask

    @property
    def dimension(self) -> int:
        """Elements of the answer."""
        return self.task.dimension


Assignment = Training | Answering


def assignment_of(task: Task, manifest: ModelManifest | None) -> Assignment:
    """Puts a task and the manifest that belongs to it together again.

    Raises:
        ValueError: a training task without the manifest of its version.
    """
    if isinstance(task, QueryTask):
        return Answering(task)
    if isinstance(task, TrainTask):
        if manifest is None:
            raise ValueError(f"no manifest of {task.model} version {task.base_version}")
        return Training(task, manifest)
    assert_never(task)


def described(task: Task) -> dict[str, Any]:
    """What a task asks, for the log."""
    if isinstance(task, TrainTask):
        return {"model": task.model, "base_version": task.base_version}
    if isinstance(task, QueryTask):
        return {"query": task.question.kind, "field": task.field}
    assert_never(task)
