"""A source that records: it looks at a sensor at a fixed period, and keeps what it saw within limits.

Readings are written in batches, to spare an SD card. A power cut costs the batch that was not written yet.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from edge_client.adapters.files import StorageError
from edge_client.adapters.sources.recordings import (
    DATABASE,
    Recordings,
    RecordingSchema,
    Retention,
    SchemaChanged,
)
from edge_client.events import Fault
from edge_client.windows import ReadingsBuilder, WindowSettings, examples_of, joined
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest

MAX_UNWRITTEN = 8_192
MAX_LABEL = 64
_LOG = logging.getLogger("covey.edge.data")
_CHANGED = Fault("schema-changed", "what is recorded changed: the device's owner must decide")


class RecordedSettings(WindowSettings):
    """The keys of every table whose source records.

    Attributes:
        period_seconds: from one reading to the next.
        flush_seconds: how often what was read is written: what a power cut may cost.
        max_megabytes: of recorded readings that are kept.
        keep_days: how long they are kept.
    """

    period_seconds: Annotated[float, Field(ge=0.005, le=86_400)]
    flush_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    max_megabytes: Annotated[float, Field(gt=0, le=100_000)] = 64.0
    keep_days: Annotated[float, Field(gt=0)] = 30.0


@dataclass(frozen=True)
class Sample:
    """What a sensor shows now.

    Attributes:
        values: in the order of the columns; NaN for one that is not known.
        label: None when there is none.
    """

    values: tuple[float, ...]
    label: str | None


class SensorError(Exception):
    """A sensor cannot be read now; the message is for the device's owner."""


class Sampler(Protocol):
    """The sensor of a recorded source."""

    def start(self) -> None:
        """Begins to listen, where a sensor speaks by itself."""
        ...

    def stop(self) -> None:
        """Ends what `start` began."""
        ...

    def sample(self, steady: float) -> Sample:
        """What it shows at a moment of the steady clock; called at the period, on one thread.

        Raises:
            SensorError: it cannot be read now.
        """
        ...

    def units(self) -> Mapping[str, str]:
        """The unit of each column whose unit is known by now."""
        ...


class RecordedSource:
    """Records while the daemon runs; trains on what was recorded, also by earlier runs."""

    def __init__(
        self,
        settings: RecordedSettings,
        directory: Path,
        sampler: Sampler,
        *,
        unix: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describes a source; nothing is opened before `start` or `load`."""
        self._settings, self._directory, self._sampler = settings, directory, sampler
        self._unix, self._steady = unix, steady
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"covey-{directory.name}", daemon=True)
        self._batch = self._fresh()
        self._changed = False
        self._there = False
        self._said: str | None = None

    # --- training ----------------------------------------------------------------------------------------

    def fault(self) -> Fault | None:
        """Says so when nothing is recorded yet, or the recording and the settings do not fit together."""
        if self._changed:
            return _CHANGED
        if self._there:
            return None
        if not (self._directory / DATABASE).exists():
            return Fault("no-data", "nothing was recorded yet")
        try:
            with Recordings.open(self._directory, read_only=True) as recordings:
                recordings.check(self._schema())
                self._there = recordings.count() > 0
        except SchemaChanged:
            return _CHANGED
        except StorageError as error:
            self._say(f"recording-unreadable reason={str(error)!r}")
            return Fault("data-unusable", "the recording cannot be read")
        return None if self._there else Fault("no-data", "nothing was recorded yet")

    def load(self, manifest: ModelManifest) -> Examples:
        """Windows of the latest readings on disk; see `DataSource.load`."""
        settings = self._settings
        keep = settings.rows(manifest)
        if not (self._directory / DATABASE).exists():
            raise InvalidExamples("nothing was recorded yet")
        try:
            with Recordings.open(self._directory, read_only=True) as recordings:
                recordings.check(self._schema())
                readings = recordings.read(len(settings.columns), keep)
        except StorageError as error:
            raise InvalidExamples(error.strerror or str(error)) from error
        if settings.max_gap_seconds is None:
            settings = settings.model_copy(update={"max_gap_seconds": 2.0 * settings.period_seconds})
        oldest = settings.oldest(self._unix())
        return joined([examples_of(readings, settings, manifest, oldest=oldest)], settings.max_examples)

    # --- recording ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to record."""
        self._thread.start()

    def stop(self) -> None:
        """Ends recording, and writes what is not written yet."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        settings = self._settings
        try:
            self._sampler.start()
            due = self._steady()
            flush = due + settings.flush_seconds
            while not self._stopping.wait(max(0.0, due - self._steady())):
                now = self._steady()
                self._look(now)
                if now >= flush or len(self._batch) >= MAX_UNWRITTEN:
                    flush = now + settings.flush_seconds
                    self._write()
                # After a suspend, or on too slow a machine, readings are left out and not made up for.
                due += settings.period_seconds * max(1.0, math.ceil((now - due) / settings.period_seconds))
            self._write()
        except Exception:
            # A defect, or a plug-in's: the device goes on with what it has.
            _LOG.exception("recording-ended name=%s", self._directory.name)
        finally:
            self._sampler.stop()

    def _look(self, steady: float) -> None:
        try:
            sample = self._sampler.sample(steady)
        except SensorError as error:
            self._say(f"sensor-unreadable reason={str(error)!r}")
            return
        self._say(None)
        if not all(map(math.isnan, sample.values)):
            label = sample.label if sample.label is None else sample.label[:MAX_LABEL]
            self._batch.add(self._unix(), sample.values, label)

    def _write(self) -> None:
        if len(self._batch) == 0:
            return
        settings = self._settings
        retention = Retention(int(settings.max_megabytes * 1e6), self._unix() - settings.keep_days * 86_400.0)
        try:
            # Opened for each batch: nothing is held between two that are minutes apart.
            with Recordings.open(self._directory) as recordings:
                recordings.append(self._schema(), self._batch.readings(), retention)
        except SchemaChanged as error:
            if not self._changed:
                _LOG.error("schema-changed name=%s reason=%r", self._directory.name, error.strerror)
            self._changed = True
            self._batch = self._fresh()
        except StorageError as error:
            # Kept in memory until the disk takes them, the latest ones.
            _LOG.warning("recording-not-written name=%s reason=%r", self._directory.name, str(error))
            if len(self._batch) > MAX_UNWRITTEN:
                self._batch.drop(len(self._batch) - MAX_UNWRITTEN)
        else:
            self._there, self._changed = True, False
            self._batch = self._fresh()

    def _fresh(self) -> ReadingsBuilder:
        return ReadingsBuilder(len(self._settings.columns), MAX_UNWRITTEN)

    def _schema(self) -> RecordingSchema:
        settings = self._settings
        return RecordingSchema(settings.columns, settings.period_seconds, self._sampler.units())

    def _say(self, line: str | None) -> None:
        """Logs a trouble once, until it is over or another one."""
        if line is not None and line != self._said:
            _LOG.warning("%s name=%s", line, self._directory.name)
        self._said = line
