"""Labelled examples of one device, as plain arrays, and their file.

Importable on the device: numpy only. Inputs are raw, in the units of the sensor: scaling belongs to the model
(`models.manifest.InputSpec`), so that the same data can feed another model.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class InvalidExamples(ValueError):
    """Arrays, or a file, that are no labelled examples."""


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What one device holds.

    Attributes:
        name: whose data it is, such as `person-03`.
        x: raw inputs, float32, shape (n, *example shape).
        y: class indices, int32, shape (n,); or labels (0 or 1) or raw values, float32, shape (n, k).
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[Any]

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together.

        Raises:
            InvalidExamples: wrong dtype or rank, different lengths, a negative class, or an input or target
                that is not finite.
        """
        ranks = {np.dtype(np.int32): 1, np.dtype(np.float32): 2}
        if self.x.dtype != np.float32 or self.y.dtype not in ranks:
            raise InvalidExamples(
                "x must be float32, y int32 classes or float32 values (use astype), not "
                f"{self.x.dtype} and {self.y.dtype}"
            )
        if self.x.ndim < 2 or self.y.ndim != ranks[self.y.dtype] or len(self.x) != len(self.y):
            raise InvalidExamples(f"x {self.x.shape} and y {self.y.shape} are not n examples with n targets")
        negative = self.y.ndim == 1 and len(self.y) > 0 and int(self.y.min()) < 0
        if negative or not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise InvalidExamples("inputs and values must be finite, and labels at least 0")

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.y)

    @classmethod
    def pooled(cls, name: str, parts: list[Examples]) -> Self:
        """The examples of several devices in one place: for a central baseline, never on a device."""
        if not parts:
            raise InvalidExamples("nothing to pool")
        return cls(
            name, np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        )

    def save(self, path: Path) -> None:
        """Write the examples as an `.npz` file (no pickled objects)."""
        with path.open("wb") as file:
            np.savez(file, name=np.array(self.name), x=self.x, y=self.y)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; a file without a name in it is called after the file.

        Raises:
            InvalidExamples: the file is no such file, or its content is not valid.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return cls(str(file["name"]) if "name" in file else path.stem, file["x"], file["y"])
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise InvalidExamples(f"{path.name} holds no examples: {error}") from error
