"""A directory of CSV files of readings, a row each; each file is a stretch of its own, and the owner's."""

from __future__ import annotations

import csv
import datetime as dt
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from edge_client.adapters.data import latest
from edge_client.events import Fault
from edge_client.windows import Readings, ReadingsBuilder, WindowSettings, examples_of, joined
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest


class CsvSettings(WindowSettings):
    """The keys of a `[[data]]` table with the source `csv`.

    Attributes:
        path: the directory; all its `*.csv` are read, in the order of their names.
        time: the column of time, in seconds since 1970 or as ISO 8601; without one, a file's own time counts.
        delimiter: between values.
        max_megabytes: of files that are read, the latest ones.
    """

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/")]
    time: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    delimiter: Annotated[str, Field(pattern=r"^[,;\t| ]$")] = ","
    max_megabytes: Annotated[float, Field(gt=0)] = 64.0


def open_csv(options: Mapping[str, Any], directory: Path) -> CsvDirectory:
    """The plug-in `csv`."""
    return CsvDirectory(CsvSettings.of(dict(options), "data (csv)"))


class CsvDirectory:
    """Every `*.csv` file of a directory. Limits say how much is used; nothing is deleted."""

    def __init__(self, settings: CsvSettings) -> None:
        self._settings = settings
        self._directory = Path(settings.path)

    def fault(self) -> Fault | None:
        """Says so when the directory is missing or holds no CSV file."""
        if not self._directory.is_dir():
            return Fault("no-data", "the data directory is not there")
        if not any(self._directory.glob("*.csv")):
            return Fault("no-data", "the data directory holds no CSV file")
        return None

    def start(self) -> None:
        """Nothing is recorded."""

    def stop(self) -> None:
        """Nothing was recorded."""

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads the latest files until there are enough windows; see `DataSource.load`."""
        settings = self._settings
        keep, oldest = settings.rows(manifest), settings.oldest(time.time())
        parts: list[Examples] = []
        # Without a column of time the files' own times decide, and with one the rows'.
        days = settings.max_age_days if settings.time is None else None
        for path in latest(self._directory.glob("*.csv"), days, settings.max_megabytes):
            readings = read_csv(path, settings, keep)
            cut = oldest if settings.time is not None else -math.inf
            parts.insert(0, examples_of(readings, settings, manifest, oldest=cut))
            if sum(map(len, parts)) >= settings.max_examples:
                break
        return joined(parts, settings.max_examples)


def read_csv(path: Path, settings: CsvSettings, keep: int) -> Readings:
    """The latest rows of a file.

    Raises:
        InvalidExamples: a column is missing, or a row holds something that is no reading.
    """
    builder = ReadingsBuilder(len(settings.columns), keep)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_ended(file), delimiter=settings.delimiter)
            header = next(rows, None)
            if header is None:
                return builder.readings()
            wanted = (*settings.columns, *(name for name in (settings.time, settings.label) if name))
            for name in wanted:
                if header.count(name) != 1:
                    raise InvalidExamples(
                        f"{path.name} has {header.count(name)} columns called {name}; its header is "
                        f"{', '.join(header)[:300]}"
                    )
            places = [header.index(name) for name in settings.columns]
            time_at = None if settings.time is None else header.index(settings.time)
            label_at = None if settings.label is None else header.index(settings.label)
            cut = 0
            for number, row in enumerate(rows, start=2):
                if cut:
                    raise InvalidExamples(f"{path.name}, line {cut}: not as many values as its header has")
                if len(row) != len(header):
                    # A last line whose quotes are open may be half a line, too.
                    cut = number
                    continue
                try:
                    values = [float(row[place]) if row[place].strip() else math.nan for place in places]
                    when = float(number) if time_at is None else seconds_of(row[time_at])
                except ValueError:
                    raise InvalidExamples(
                        f"{path.name}, line {number}: a value is no number, or its time is none"
                    ) from None
                label = row[label_at].strip() or None if label_at is not None else None
                builder.add(when, values, label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidExamples(f"{path.name} cannot be read: {error}") from error
    return builder.readings()


def _ended(lines: Iterable[str]) -> Iterator[str]:
    """The lines that have an end: of a file that is being written, the last number may be half a number."""
    return (line for line in lines if line.endswith(("\n", "\r")))


def seconds_of(value: str | float) -> float:
    """Seconds since 1970 of a number, or of ISO 8601 text; without a zone it is UTC.

    Raises:
        ValueError: it is neither.
    """
    try:
        seconds = float(value)
    except ValueError:
        moment = dt.datetime.fromisoformat(str(value).strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError("a time is not finite")
    return seconds
