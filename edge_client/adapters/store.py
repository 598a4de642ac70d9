"""The device's durable memory: one SQLite file that loses nothing committed to SIGKILL or a power cut.

    rounds    every round ever joined; secrets only in the active one's row
    ledger    what this device contributed
    versions  signed manifests, and what became of them
    local     which file holds this device's local parameters of a model
    pending   which file holds an update that waits for a buffer

WAL with synchronous=FULL makes a commit durable when it returns, and lets `status` and `predict` read while
`run` writes. `secure_delete` and a truncated log take the secrets of a finished round off the file as far as
software can; what an SD card's controller keeps is beyond it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from edge_client.adapters import device_rows
from edge_client.adapters.blobs import Blobs
from edge_client.adapters.device_schema import check_schema, configure
from edge_client.adapters.files import (
    StorageError,
    StorageFull,
    open_private,
    private_directory,
    storage_errors,
)
from edge_client.durable import (
    CloseRound,
    DropPending,
    Durable,
    PendingUpdate,
    SaveLocal,
    SavePending,
    StoreChunk,
)
from edge_client.ledger import DAY, DaySpent, LedgerEntry
from edge_client.library import StoredStanding, StoredVersion
from edge_client.session_state import Memory
from protocol.dp.events import DPEvent

DATABASE = "device.sqlite"


@dataclass(frozen=True)
class RoundSummary:
    """A round as `status` shows it."""

    round_id: str
    joined_at: int
    phase: str
    outcome: str | None


class DeviceStore:
    """The device's database and files. One process writes at a time; `read_only` ones may look on."""

    def __init__(self, connection: sqlite3.Connection, blobs: Blobs, *, read_only: bool) -> None:
        self._connection = connection
        self._read_only = read_only
        self.blobs = blobs

    @classmethod
    def open(cls, directory: Path, *, read_only: bool = False) -> Self:
        """Opens the store of a state directory, making it when it is not there.

        Raises:
            UnknownSchema: another version of the client made it.
            StorageError: the file system or the database refuses.
        """
        blobs, path = Blobs(directory), directory / DATABASE
        if not read_only:
            private_directory(directory)
            blobs.prepare()
            with storage_errors(f"opening {path}"):
                # SQLite gives its log the mode of the database, so the file is made before it is opened.
                os.close(open_private(path, os.O_RDWR | os.O_CREAT))
        with _typed_errors("opening the database"):
            mode = "ro" if read_only else "rw"
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=2.0
            )
            try:
                check_schema(connection, path)
                if not read_only:
                    configure(connection)
            except BaseException:
                connection.close()
                raise
        return cls(connection, blobs, read_only=read_only)

    def close(self) -> None:
        """Closes the database."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def __enter__(self) -> Self:
        """Returns the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the database."""
        self.close()

    # --- writing -----------------------------------------------------------------------------------------

    def apply(self, outputs: Iterable[Durable]) -> None:
        """Makes these durable, all or none; when it returns, they are.

        Files are written before the transaction that refers to them, and deleted after the one that forgets
        them, so that a cut in between leaves a file too many and never one too few.

        Raises:
            StorageFull: no space is left; nothing changed.
            StorageError: the database fails; nothing changed.
        """
        outputs = tuple(outputs)
        rows = []
        for output in outputs:
            if isinstance(output, StoreChunk):
                self.blobs.store_chunk(output.blob, output.index, output.body)
            else:
                rows.append(output)
        if rows:
            with self._transaction():
                for output in rows:
                    device_rows.write(self._connection, output)
        closed = [output.round_id for output in rows if isinstance(output, CloseRound)]
        for round_id in closed:
            # The round is over whatever happens here: what remains is deleted at the next start.
            with contextlib.suppress(StorageError):
                self.blobs.remove_upload(round_id)
        if closed:
            self._truncate_log()
        if any(isinstance(output, SaveLocal) for output in rows):
            # What remains is deleted at the next start.
            with contextlib.suppress(StorageError):
                self.keep_local()
        if any(isinstance(output, SavePending | DropPending) for output in rows):
            with contextlib.suppress(StorageError):
                self.keep_pending()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _typed_errors("saving"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def _truncate_log(self) -> None:
        # A reader may hold the log; then the next round's end empties it.
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def keep_local(self) -> None:
        """Deletes every file of local parameters that the database does not name.

        Raises:
            StorageError: reading or deleting failed.
        """
        self.blobs.keep_local(frozenset(saved.blob.sha256 for saved in self.local()))

    def forget_local(self, model: str | None = None) -> tuple[str, ...]:
        """Forgets the local parameters of a model, or of all; returns the names of the models that had any.

        Raises:
            StorageError: the database fails, and nothing changed; or a file cannot be deleted.
        """
        forgotten = tuple(saved.model for saved in self.local() if model in (None, saved.model))
        with self._transaction():
            self._connection.executemany("DELETE FROM local WHERE model = ?", [(name,) for name in forgotten])
            # An update that waits holds what they had become, and would bring it back.
            self._connection.execute("DELETE FROM pending WHERE ? IN (model, '')", (model or "",))
        self.keep_local()
        self.keep_pending()
        return forgotten

    def keep_pending(self) -> None:
        """Deletes every file of a pending update that the database does not name.

        Raises:
            StorageError: reading or deleting failed.
        """
        rows = self._connection.execute("SELECT sha256 FROM pending").fetchall()
        self.blobs.keep_pending(frozenset(row[0] for row in rows))

    # --- reading -----------------------------------------------------------------------------------------

    def load(self) -> Memory:
        """Everything that the core needs to go on where the last process stopped.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the database"):
            active = device_rows.active_round(self._connection)
            if active is None and not self._read_only:
                self._abandon()
            used = frozenset(row[0] for row in self._connection.execute("SELECT round_id FROM rounds"))
            joined = self._connection.execute(
                "SELECT joined_at FROM rounds ORDER BY joined_at DESC LIMIT 10000"
            )
            times = self._connection.execute("SELECT at FROM ledger ORDER BY sequence DESC LIMIT 10000")
            return Memory(
                versions=self.versions(),
                standings=self.standings(),
                local=self.local(),
                pending=self.pending(),
                active=active,
                used=used,
                joined_at=tuple(row[0] for row in joined)[::-1],
                contributed_at=tuple(row[0] for row in times)[::-1],
                spent=self._spent(),
                client=device_rows.client(self._connection),
                personalised=frozenset(r.manifest_sha256 for r in self.blobs.personal.records()),
            )

    def _spent(self) -> tuple[DaySpent, ...]:
        """Every contribution, by day; the database adds them up, so that an old ledger is soon read."""
        rows = self._connection.execute(
            f"SELECT at / {DAY} AS day, json_extract(entry, '$.event') AS event, count(*) FROM ledger"  # noqa: S608
            " GROUP BY day, event ORDER BY day"
        )
        return tuple(DaySpent(day, DPEvent.model_validate_json(event), count) for day, event, count in rows)

    def _abandon(self) -> None:
        """Erases the secrets of a round that nobody can go on with."""
        self._connection.execute(
            "UPDATE rounds SET outcome = 'unreadable', plan = NULL, manifest = NULL, client = NULL,"
            " upload_sha256 = NULL, upload_size = NULL WHERE client IS NOT NULL"
        )

    def versions(self) -> tuple[StoredVersion, ...]:
        """Every version this device remembers; a good one whose files are gone is a candidate again.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the versions"):
            return device_rows.versions(self._connection, self.blobs)

    def standings(self) -> tuple[StoredStanding, ...]:
        """What this device was told to have, as the fleet and by itself.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading what is assigned"):
            return device_rows.standings(self._connection)

    def local(self) -> tuple[SaveLocal, ...]:
        """This device's local parameters, by model.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the local parameters"):
            return device_rows.local(self._connection)

    def pending(self) -> tuple[PendingUpdate, ...]:
        """The updates that wait for a buffer, by model.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the pending updates"):
            return device_rows.pending(self._connection)

    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Every contribution, in order.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the ledger"):
            rows = self._connection.execute("SELECT entry FROM ledger ORDER BY sequence").fetchall()
        return tuple(LedgerEntry.model_validate_json(row[0]) for row in rows)

    def rounds(self, limit: int = 10) -> tuple[RoundSummary, ...]:
        """The rounds joined last, newest first.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the rounds"):
            rows = self._connection.execute(
                "SELECT round_id, joined_at, phase, outcome FROM rounds"
                " ORDER BY joined_at DESC, round_id LIMIT ?",
                (limit,),
            ).fetchall()
        return tuple(RoundSummary(*row) for row in rows)


@contextlib.contextmanager
def _typed_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        raise (StorageFull if full else StorageError)(28 if full else 5, f"{doing}: {error}") from error
