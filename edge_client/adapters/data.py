"""The device's own examples: a directory of NPZ files. Nothing read here ever leaves the device."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_client.events import Fault
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest


class DataSource(Protocol):
    """Where examples come from."""

    def fault(self) -> Fault | None:
        """Why there is nothing to train on right now, without reading it all."""
        ...

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads the examples for one model.

        Raises:
            InvalidExamples: there are none, or they are not what the model takes.
        """
        ...


class NpzDirectory:
    """Every `*.npz` file of a directory: `x` float32 (n, *example shape) and `y` int32 (n,), raw values."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def fault(self) -> Fault | None:
        """Says so when the directory is missing or holds no NPZ file."""
        if not self._directory.is_dir():
            return Fault("no-data", "the data directory is not there")
        if not any(self._directory.glob("*.npz")):
            return Fault("no-data", "the data directory holds no NPZ file")
        return None

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads and joins the files, in the order of their names; see `DataSource.load`."""
        parts = [_read(path, manifest) for path in sorted(self._directory.glob("*.npz"))]
        if not parts or not sum(len(part) for part in parts):
            raise InvalidExamples("the data directory holds no examples")
        if len(parts) == 1:
            return parts[0]
        x = np.concatenate([part.x for part in parts])
        return Examples("device", x, np.concatenate([part.y for part in parts]))


def _read(path: Path, manifest: ModelManifest) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as file:
            examples = Examples("device", file["x"], file["y"])
    except KeyError as error:
        raise InvalidExamples(f"{path.name} has no array {error}") from error
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidExamples(f"{path.name} holds no examples: {error}") from error
    if examples.x.shape[1:] != manifest.input.shape:
        raise InvalidExamples(
            f"{path.name} has examples of shape {examples.x.shape[1:]}, "
            f"the model takes {manifest.input.shape}"
        )
    # Values and several labels at a time are checked by the trainer, against the manifest's target.
    if examples.y.ndim == 1 and len(examples) and int(examples.y.max()) >= len(manifest.labels):
        raise InvalidExamples(f"{path.name} has a label beyond the model's {len(manifest.labels)} classes")
    return examples
