"""Examples of readings: rows of sensors' channels in the order of time, cut into windows with a target. Pure.

A window is as many rows as the model's input is long, so that nothing has to be said twice. It never spans a
gap, a missing value or a change of label: what is no whole example is left out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from edge_client.configuration import Section
from edge_client.ledger import DAY
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest

MAX_COLUMNS = 256
NO_LABEL = -1

Column = Annotated[str, Field(min_length=1, max_length=128)]
Label = Annotated[str, Field(max_length=64)]
Columns = Annotated[tuple[Column, ...], Field(strict=False, max_length=MAX_COLUMNS)]


class WindowSettings(Section):
    """How readings become examples.

    Attributes:
        channels: the columns of a window, in the order of the last axis of the model's input.
        label: where the class of a reading comes from: a column, or what the source says.
        classes: label in the data -> label of the model; "" leaves readings with that label out.
        targets: columns whose values are predicted, in the order of the model's labels, in place of a class.
        ahead: how many readings after the last one of a window its target is.
        stride: readings from the start of one window to that of the next; the length of a window by default.
        max_gap_seconds: readings further apart than this share no window.
        max_examples: how many windows a training uses at most, the latest ones.
        max_age_days: how old a window may be.
    """

    channels: Annotated[Columns, Field(min_length=1)]
    label: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    classes: Annotated[dict[Label, Label], Field(max_length=1024, default_factory=dict)]
    targets: Columns = ()
    ahead: Annotated[int, Field(ge=0, le=100_000)] = 0
    stride: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_gap_seconds: Annotated[float, Field(gt=0)] | None = None
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 2_000
    max_age_days: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> Self:
        if (self.label is None) == (not self.targets):
            raise ValueError("set either label, for a model of classes, or targets, for one of values")
        if self.ahead and not self.targets:
            raise ValueError("ahead needs targets: a label is that of the whole window")
        if len(set(self.channels)) != len(self.channels):
            raise ValueError("a channel is named twice")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that readings must have."""
        return tuple(dict.fromkeys((*self.channels, *self.targets)))

    def oldest(self, now: float) -> float:
        """The time, in seconds since 1970, before which a window is too old."""
        return -math.inf if self.max_age_days is None else now - self.max_age_days * DAY

    def rows(self, manifest: ModelManifest) -> int:
        """How many readings give `max_examples` windows, where nothing has to be left out.

        Raises:
            InvalidExamples: the channels do not fit the model's input.
        """
        length = window_length(manifest, len(self.channels))
        return length + self.ahead + (self.stride or length) * (self.max_examples - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """Rows in the order in which they were measured.

    Attributes:
        times: float64 (n,), seconds since 1970; or the number of the row, where there is no time.
        values: float32 (n, columns), NaN where a value is missing.
        codes: int32 (n,), indices into `names`; `NO_LABEL` where there is no label.
        names: labels, as the data has them.
    """

    times: NDArray[np.float64]
    values: NDArray[np.float32]
    codes: NDArray[np.int32]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.times)


class ReadingsBuilder:
    """Collects rows in little memory; of more than `keep`, only the latest are surely there."""

    def __init__(self, columns: int, keep: int) -> None:
        self._columns, self._keep = columns, keep
        self._times, self._values, self._codes = array("d"), array("f"), array("i")
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._times)

    def add(self, time: float, values: Sequence[float], label: str | None) -> None:
        """Adds a row: NaN for a missing value, None for no label."""
        self._times.append(time)
        self._values.extend(values)
        code = NO_LABEL if label is None else self._names.setdefault(label, len(self._names))
        self._codes.append(code)
        if len(self._times) >= 2 * self._keep:
            self.drop(len(self._times) - self._keep)

    def drop(self, count: int) -> None:
        """Forgets the first rows."""
        del self._times[:count], self._codes[:count]
        del self._values[: count * self._columns]

    def readings(self) -> Readings:
        """All rows that are kept, as a copy."""
        return Readings(
            np.array(self._times, np.float64),
            np.array(self._values, np.float32).reshape(-1, self._columns),
            np.array(self._codes, np.int32),
            tuple(self._names),
        )


def window_length(manifest: ModelManifest, channels: int) -> int:
    """How many readings the model's input is long.

    The input is (length, channels), also with axes of 1 after it; or (channels,), one reading; or (length,),
    where there is one channel.

    Raises:
        InvalidExamples: it is none of these.
    """
    shape = manifest.input.shape
    if shape == (channels,):
        return 1
    if len(shape) == 1 and channels == 1:
        return shape[0]
    if len(shape) >= 2 and shape[1] == channels and all(axis == 1 for axis in shape[2:]):
        return shape[0]
    raise InvalidExamples(
        f"{manifest.name} takes inputs of shape {shape}: {channels} channels in `channels` do not fit it"
    )


def examples_of(
    readings: Readings, settings: WindowSettings, manifest: ModelManifest, *, oldest: float = -math.inf
) -> Examples:
    """The windows of some readings; none, where they are too few.

    Args:
        readings: with the columns of `settings.columns`, in that order.
        settings: how to cut them.
        manifest: of the model that they are for.
        oldest: windows that end before this time, in seconds since 1970, are left out.

    Raises:
        InvalidExamples: they cannot be examples of this model, or a label is not one of the model's.
    """
    length = window_length(manifest, len(settings.channels))
    _check_target(settings, manifest)
    # The first columns are the channels.
    width = len(settings.channels)
    starts = _starts(readings, settings, length)
    ends = starts + length - 1
    missing = ~np.isfinite(readings.values[:, :width]).all(axis=1)
    whole = _none_between(missing, starts, ends) & (readings.times[ends] >= oldest)
    if settings.label is not None:
        classes = _classes(readings.names, settings.classes, manifest)
        codes = np.where(readings.codes == NO_LABEL, len(classes), readings.codes)
        classes = np.append(classes, np.int32(_LEFT_OUT))
        changes = np.append(False, codes[1:] != codes[:-1])
        whole &= _none_between(changes, starts + 1, ends) & (classes[codes[starts]] != _LEFT_OUT)
        starts = starts[whole][-settings.max_examples :]
        y: NDArray[Any] = classes[codes[starts]]
        if (y == _UNKNOWN).any():
            unknown = readings.names[int(codes[starts][y == _UNKNOWN][0])]
            raise InvalidExamples(
                f"the label {unknown!r} is none of {manifest.name}'s ({', '.join(manifest.labels)}): "
                'map it in `classes`, to "" to leave it out'
            )
    else:
        order = [settings.columns.index(name) for name in settings.targets]
        whole &= np.isfinite(readings.values[ends + settings.ahead][:, order]).all(axis=1)
        starts = starts[whole][-settings.max_examples :]
        y = readings.values[starts + length - 1 + settings.ahead][:, order]
    rows = starts[:, np.newaxis] + np.arange(length)
    x = readings.values[:, :width][rows].reshape(-1, *manifest.input.shape)
    return Examples("device", x, y)


def joined(parts: Sequence[Examples], most: int) -> Examples:
    """The latest examples of several parts, which are in the order of time.

    Raises:
        InvalidExamples: there are none.
    """
    filled = [part for part in parts if len(part)]
    if not filled:
        raise InvalidExamples("the readings give no whole window with a target")
    x = np.concatenate([part.x for part in filled]) if len(filled) > 1 else filled[0].x
    y = np.concatenate([part.y for part in filled]) if len(filled) > 1 else filled[0].y
    return Examples("device", x[-most:], y[-most:])


_LEFT_OUT, _UNKNOWN = -1, -2


def _check_target(settings: WindowSettings, manifest: ModelManifest) -> None:
    if settings.label is not None:
        if manifest.target.shape:
            raise InvalidExamples(f"{manifest.name} predicts {', '.join(manifest.labels)}: set `targets`")
    elif manifest.target.shape != (len(settings.targets),):
        raise InvalidExamples(
            f"{manifest.name} predicts {', '.join(manifest.labels)}: "
            + (f"`targets` names {len(settings.targets)}" if manifest.target.shape else "set `label`")
        )


def _starts(readings: Readings, settings: WindowSettings, length: int) -> NDArray[np.int64]:
    """Where windows start: from the start of each stretch without a gap, by the stride."""
    if len(readings) == 0:
        return np.zeros(0, np.int64)
    steps = np.diff(readings.times)
    # A clock that was set back is a gap, too.
    gaps = steps < 0 if settings.max_gap_seconds is None else (steps < 0) | (steps > settings.max_gap_seconds)
    edges = [0, *(np.flatnonzero(gaps) + 1).tolist(), len(readings)]
    needed = length + settings.ahead
    stretches = [
        np.arange(start, end - needed + 1, settings.stride or length, dtype=np.int64)
        for start, end in pairwise(edges)
        if end - start >= needed
    ]
    return np.concatenate(stretches) if stretches else np.zeros(0, np.int64)


def _none_between(
    flags: NDArray[np.bool_], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """For each pair of rows, whether no flag is set from the one to the other."""
    counts = np.append(0, np.cumsum(flags))
    result: NDArray[np.bool_] = counts[last + 1] == counts[np.minimum(first, last + 1)]
    return result


def _classes(names: Sequence[str], mapping: Mapping[str, str], manifest: ModelManifest) -> NDArray[np.int32]:
    """The model's class of each label in the data; a number counts as the class with that index."""
    classes = []
    for name in names:
        meant = mapping.get(name, name)
        if meant == "":
            classes.append(_LEFT_OUT)
        elif meant in manifest.labels:
            classes.append(manifest.labels.index(meant))
        elif meant.isdecimal() and int(meant) < len(manifest.labels):
            classes.append(int(meant))
        else:
            classes.append(_UNKNOWN)
    return np.array(classes, np.int32)
