"""The device's own examples: a directory of NPZ files. Nothing read here ever leaves the device."""

from __future__ import annotations

import contextlib
import math
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from edge_client.configuration import Section
from edge_client.events import Fault
from edge_client.ledger import DAY
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest


class NpzSettings(Section):
    """The keys of a `[[data]]` table with the source `npz`.

    Attributes:
        path: the directory.
        max_examples: how many examples a training uses at most, the latest ones.
        max_age_days: how long ago a file may have been written.
        max_megabytes: of files that are read, the latest ones.
    """

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/")]
    max_examples: Annotated[int, Field(ge=1)] | None = None
    max_age_days: Annotated[float, Field(gt=0)] | None = None
    max_megabytes: Annotated[float, Field(gt=0)] | None = None


def open_npz(options: Mapping[str, Any], directory: Path) -> NpzDirectory:
    """The plug-in `npz`."""
    settings = NpzSettings.of(dict(options), "data (npz)")
    return NpzDirectory(Path(settings.path), settings)


class NpzDirectory:
    """Every `*.npz` file of a directory: `x` float32 (n, *example shape) and `y` int32 (n,), raw values.

    The files are the owner's: limits say how much is used, and nothing is deleted.
    """

    def __init__(self, directory: Path, limits: NpzSettings | None = None) -> None:
        self._directory, self._limits = directory, limits

    def fault(self) -> Fault | None:
        """Says so when the directory is missing or holds no NPZ file."""
        if not self._directory.is_dir():
            return Fault("no-data", "the data directory is not there")
        if not any(self._directory.glob("*.npz")):
            return Fault("no-data", "the data directory holds no NPZ file")
        return None

    def start(self) -> None:
        """Nothing is recorded."""

    def stop(self) -> None:
        """Nothing was recorded."""

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads and joins the files, in the order of their names; see `DataSource.load`."""
        limits = self._limits
        parts: list[Examples] = []
        count, most = 0, limits.max_examples if limits else None
        for path in latest(
            self._directory.glob("*.npz"),
            limits.max_age_days if limits else None,
            limits.max_megabytes if limits else None,
        ):
            parts.insert(0, _read(path, manifest))
            count += len(parts[0])
            if most is not None and count >= most:
                break
        if not count:
            raise InvalidExamples("the data directory holds no examples")
        x = parts[0].x if len(parts) == 1 else np.concatenate([part.x for part in parts])
        y = parts[0].y if len(parts) == 1 else np.concatenate([part.y for part in parts])
        return Examples("device", x[-most:], y[-most:]) if most else Examples("device", x, y)


def latest(paths: Iterable[Path], days: float | None, megabytes: float | None) -> Iterator[Path]:
    """Files from the last name to the first, as long as they are young enough and together not too large.

    The last one is always there, unless it is too old.
    """
    room = math.inf if megabytes is None else megabytes * 1e6
    first = True
    for path in sorted(paths, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if days is not None and found.st_mtime < time.time() - days * DAY:
                continue
            room -= found.st_size
            if room < 0 and not first:
                return
            first = False
            yield path


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
