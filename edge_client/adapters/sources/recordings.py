"""What a sensor gave, in a SQLite file of the source's own: a row for each batch, so that writes are few.

    meta      the columns and their units, as they were when the first batch came
    labels    texts that stand behind the codes in a batch
    batches   times (float64), values (float32, row by row) and codes (int32), little-endian, and how many

WAL with synchronous=NORMAL: a power cut loses at most what was not yet synced, and leaves whole batches. In
the transaction that adds one, those that are too old or too many go, so that the file stays bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from edge_client.adapters.files import (
    StorageError,
    StorageFull,
    open_private,
    private_directory,
    storage_errors,
)
from edge_client.windows import NO_LABEL, Readings

DATABASE = "recordings.sqlite"
APPLICATION_ID = 0x436F7652  # "CovR"
SCHEMA_VERSION = 1
MAX_LABELS = 1024
_LOG_BYTES = 1 << 20
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE labels (code INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE batches (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    newest REAL NOT NULL,
    count INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    times BLOB NOT NULL,
    readings BLOB NOT NULL,
    codes BLOB NOT NULL
) STRICT;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class SchemaChanged(StorageError):
    """What is recorded now is not what was recorded before: both together would make no examples."""


@dataclass(frozen=True)
class RecordingSchema:
    """What a row of a recording means.

    Attributes:
        columns: names of the values.
        period_seconds: between rows.
        units: of the columns whose unit is known.
    """

    columns: tuple[str, ...]
    period_seconds: float
    units: Mapping[str, str]


@dataclass(frozen=True)
class Retention:
    """How much of a recording is kept: batches from the latest backwards.

    Attributes:
        max_bytes: of all batches.
        oldest: seconds since 1970.
    """

    max_bytes: int
    oldest: float = -math.inf


class Recordings:
    """The recording of one source. One process writes; others may read meanwhile."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def open(cls, directory: Path, *, read_only: bool = False) -> Self:
        """Opens the recording in a directory; a writer makes it.

        Raises:
            StorageError: it cannot be opened, or is none that this client knows.
        """
        path = directory / DATABASE
        if not read_only:
            private_directory(directory)
            with storage_errors(f"opening {path}"):
                os.close(open_private(path, os.O_RDWR | os.O_CREAT))
        with _typed_errors(f"opening {path}"):
            address = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
            connection = sqlite3.connect(
                address, uri=True, isolation_level=None, timeout=2.0, check_same_thread=False
            )
            try:
                if not read_only:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = NORMAL")
                    connection.execute("PRAGMA secure_delete = FAST")
                    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
                    if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
                        connection.executescript(_SCHEMA)
                found = tuple(
                    connection.execute(f"PRAGMA {name}").fetchone()[0]
                    for name in ("application_id", "user_version")
                )
                if found != (APPLICATION_ID, SCHEMA_VERSION):
                    raise StorageError(1, f"{path} is no recording that this client knows")
            except BaseException:
                connection.close()
                raise
        return cls(connection)

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def __enter__(self) -> Self:
        """Returns the open recording."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def check(self, schema: RecordingSchema) -> None:
        """Looks whether rows of this meaning may follow those that are there; units may become known later.

        Raises:
            SchemaChanged: they may not.
            StorageError: the file cannot be read.
        """
        with _typed_errors("reading a recording"):
            row = self._connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if row is None:
            return
        known = _schema(row[0])
        what = None
        if known.columns != schema.columns:
            what = f"the columns {', '.join(known.columns)}, now they are {', '.join(schema.columns)}"
        elif known.period_seconds != schema.period_seconds:
            what = f"a reading every {known.period_seconds:g} s, now every {schema.period_seconds:g} s"
        else:
            for column in known.units.keys() & schema.units.keys():
                if known.units[column] != schema.units[column]:
                    what = f"{column} in {known.units[column]!r}, now it is in {schema.units[column]!r}"
        if what is not None:
            raise SchemaChanged(
                22,
                f"so far this was recorded with {what}: set it back, or delete the recording by "
                "`covey-edge reset --recordings` and start anew",
            )

    def append(self, schema: RecordingSchema, batch: Readings, retention: Retention) -> None:
        """Adds a batch durably, and deletes what need not be kept; all or nothing.

        Raises:
            SchemaChanged: rows of this meaning cannot follow those that are there.
            StorageFull: no space is left.
            StorageError: the file cannot be written.
        """
        self.check(schema)
        with _typed_errors("writing a recording"):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._save_schema(schema)
                codes = self._codes(batch)
                parts = (
                    batch.times.astype("<f8").tobytes(),
                    batch.values.astype("<f4").tobytes(),
                    codes.astype("<i4").tobytes(),
                )
                connection.execute(
                    "INSERT INTO batches (newest, count, bytes, times, readings, codes)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (float(batch.times.max()), len(batch), sum(map(len, parts)), *parts),
                )
                self._retain(retention)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def _save_schema(self, schema: RecordingSchema) -> None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        units = {**(_schema(row[0]).units if row else {}), **schema.units}
        value = json.dumps([schema.columns, schema.period_seconds, units])
        if row is None or row[0] != value:
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (value,))

    def _codes(self, batch: Readings) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The batch's codes as the file's; labels beyond what a model can have are no labels."""
        known = {name: code for code, name in self._connection.execute("SELECT code, name FROM labels")}
        places = np.full(len(batch.names) + 1, NO_LABEL, np.int32)
        for place, name in enumerate(batch.names):
            if name not in known and len(known) < MAX_LABELS:
                known[name] = len(known)
                self._connection.execute("INSERT INTO labels VALUES (?, ?)", (known[name], name))
            places[place] = known.get(name, NO_LABEL)
        return places[batch.codes]

    def _retain(self, retention: Retention) -> None:
        self._connection.execute("DELETE FROM batches WHERE newest < ?", (retention.oldest,))
        # The latest batch stays, however large it is.
        self._connection.execute(
            "DELETE FROM batches WHERE sequence < (SELECT coalesce(min(sequence), 0) FROM"
            " (SELECT sequence, sum(bytes) OVER (ORDER BY sequence DESC) AS total FROM batches)"
            " WHERE total <= ? OR sequence = (SELECT max(sequence) FROM batches))",
            (retention.max_bytes,),
        )

    def count(self) -> int:
        """How many rows there are.

        Raises:
            StorageError: the file cannot be read.
        """
        with _typed_errors("reading a recording"):
            row = self._connection.execute("SELECT coalesce(sum(count), 0) FROM batches").fetchone()
        return int(row[0])

    def read(self, columns: int, most: int) -> Readings:
        """The latest rows, in the order in which they were recorded.

        Args:
            columns: how many values a row has.
            most: whole batches are read until there are so many rows.

        Raises:
            StorageError: the file cannot be read, or a batch in it is damaged.
        """
        parts: list[tuple[bytes, bytes, bytes]] = []
        with _typed_errors("reading a recording"):
            names = tuple(
                name for _, name in self._connection.execute("SELECT code, name FROM labels ORDER BY code")
            )
            total = 0
            for count, *blobs in self._connection.execute(
                "SELECT count, times, readings, codes FROM batches ORDER BY sequence DESC"
            ):
                if [len(blob) for blob in blobs] != [8 * count, 4 * count * columns, 4 * count]:
                    raise StorageError(
                        5, "a recording is damaged: `covey-edge reset --recordings` deletes it"
                    )
                parts.insert(0, (blobs[0], blobs[1], blobs[2]))
                total += count
                if total >= most:
                    break
        times, values, codes = (b"".join(part[i] for part in parts) for i in range(3))
        return Readings(
            np.frombuffer(times, "<f8").astype(np.float64),
            np.frombuffer(values, "<f4").astype(np.float32).reshape(-1, columns),
            np.frombuffer(codes, "<i4").astype(np.int32),
            names,
        )


def _schema(value: str) -> RecordingSchema:
    columns, period, units = json.loads(value)
    return RecordingSchema(tuple(columns), float(period), dict(units))


@contextlib.contextmanager
def _typed_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        raise (StorageFull if full else StorageError)(28 if full else 5, f"{doing}: {error}") from error
