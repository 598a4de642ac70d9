"""A table of readings in a SQLite database that some other program of the owner writes; it is only read."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from edge_client.adapters.sources.csv_files import seconds_of
from edge_client.events import Fault
from edge_client.windows import Column, Readings, ReadingsBuilder, WindowSettings, examples_of, joined
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest

BUSY_SECONDS = 5.0


class SqliteSettings(WindowSettings):
    """The keys of a `[[data]]` table with the source `sqlite`.

    Attributes:
        path: the database.
        table: a table or a view.
        time: the column of time, in seconds since 1970 or as ISO 8601; rows are ordered by it.
    """

    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/")]
    table: Column
    time: Column


def open_sqlite(options: Mapping[str, Any], directory: Path) -> SqliteTable:
    """The plug-in `sqlite`."""
    return SqliteTable(SqliteSettings.of(dict(options), "data (sqlite)"))


class SqliteTable:
    """The latest rows of one table. Nothing in the database is changed."""

    def __init__(self, settings: SqliteSettings) -> None:
        self._settings = settings

    def fault(self) -> Fault | None:
        """Says so when the database is not there."""
        if not Path(self._settings.path).is_file():
            return Fault("no-data", "the database of readings is not there")
        return None

    def start(self) -> None:
        """Nothing is recorded."""

    def stop(self) -> None:
        """Nothing was recorded."""

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads as many of the latest rows as the windows need; see `DataSource.load`."""
        settings = self._settings
        readings = read_table(settings, settings.rows(manifest))
        found = examples_of(readings, settings, manifest, oldest=settings.oldest(time.time()))
        return joined([found], settings.max_examples)


def read_table(settings: SqliteSettings, most: int) -> Readings:
    """The latest rows of the table, in the order of time.

    Raises:
        InvalidExamples: the database or a column is not there, or a row holds something that is no reading.
    """
    path = Path(settings.path)
    label = () if settings.label is None else (settings.label,)
    wanted = (settings.time, *settings.columns, *label)
    builder = ReadingsBuilder(len(settings.columns), most)
    try:
        # Opened anew each time: the other program may have replaced the file.
        address = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA query_only = ON")
            # Without this check SQLite takes an unknown name in quotes for a text.
            there = [row[1] for row in connection.execute(f"PRAGMA table_xinfo({_quoted(settings.table)})")]
            for name in wanted:
                if name not in there:
                    what = f"columns {', '.join(there)[:300]}" if there else "no such table"
                    raise InvalidExamples(
                        f"{path.name} has no {name} in {settings.table} any more, or never had; it has {what}"
                    )
            columns = ", ".join(map(_quoted, wanted))
            table, order = _quoted(settings.table), _quoted(settings.time)
            rows = connection.execute(
                f"SELECT * FROM (SELECT {columns} FROM {table} WHERE {order} IS NOT NULL"  # noqa: S608
                f" ORDER BY {order} DESC LIMIT ?) ORDER BY {order}",
                (most,),
            )
            end = 1 + len(settings.columns)
            for row in rows:
                try:
                    values = [_number(value) for value in row[1:end]]
                    when = seconds_of(row[0])
                except (TypeError, ValueError):
                    raise InvalidExamples(
                        f"{settings.table} in {path.name} holds a row in which a value is no number, or the "
                        "time is none"
                    ) from None
                found = row[end] if label else None
                builder.add(when, values, None if found in (None, "") else str(found))
    except sqlite3.Error as error:
        raise InvalidExamples(f"{path.name} cannot be read: {error}") from error
    return builder.readings()


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int | float):
        return float(value)
    raise TypeError("no number")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
