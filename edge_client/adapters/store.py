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
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, assert_never

from edge_client.adapters.blobs import Blobs
from edge_client.adapters.device_schema import check_schema, configure
from edge_client.adapters.files import (
    StorageError,
    StorageFull,
    open_private,
    private_directory,
    storage_errors,
)
from edge_client.events import (
    CloseRound,
    DropPending,
    Durable,
    ForgetVersion,
    PendingUpdate,
    RoundRecord,
    SaveContribution,
    SaveLocal,
    SavePending,
    SaveRound,
    SaveStanding,
    SaveVersion,
    StoreChunk,
    VersionStatus,
)
from edge_client.ledger import DAY, DaySpent, LedgerEntry
from edge_client.library import StoredStanding, StoredVersion, Version
from edge_client.session import Memory
from models.assignment import Answering, Assignment, assignment_of
from models.manifest import ModelManifest
from protocol.dp.events import DPEvent
from protocol.errors import MalformedMessage
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.secagg.client_state import dump_state, load_state
from protocol.version_assignment import VersionAssignment

DATABASE = "device.sqlite"
_LOG = logging.getLogger("covey.edge.store")


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
                    self._write(output)
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

    def _write(
        self,
        output: SaveRound
        | SaveContribution
        | SaveLocal
        | SavePending
        | DropPending
        | CloseRound
        | SaveVersion
        | SaveStanding
        | ForgetVersion,
    ) -> None:
        if isinstance(output, SaveRound):
            self._save_round(output.record, output.at)
        elif isinstance(output, SaveContribution):
            entry = output.entry
            self._connection.execute(
                "INSERT INTO ledger (round_id, at, entry) VALUES (?, ?, ?)",
                (entry.round_id, entry.at, entry.model_dump_json()),
            )
        elif isinstance(output, CloseRound):
            self._connection.execute(
                "UPDATE rounds SET outcome = ?, closed_at = ?, plan = NULL, manifest = NULL, client = NULL,"
                " upload_sha256 = NULL, upload_size = NULL WHERE round_id = ?",
                (output.outcome, output.at, output.round_id),
            )
        elif isinstance(output, SaveVersion):
            self._save_version(output)
        elif isinstance(output, SaveStanding):
            assignment, manifest = output.assignment, output.manifest
            self._connection.execute(
                "INSERT OR REPLACE INTO standings (model, own, assignment, manifest) VALUES (?, ?, ?, ?)",
                (
                    assignment.model,
                    int(assignment.device is not None),
                    output.document.model_dump_json(),
                    None if manifest is None else manifest.model_dump_json(),
                ),
            )
        elif isinstance(output, SaveLocal):
            self._connection.execute(
                "INSERT OR REPLACE INTO local (model, layout, sha256, size) VALUES (?, ?, ?, ?)",
                (output.model, output.layout, output.blob.sha256, output.blob.size),
            )
        elif isinstance(output, SavePending):
            update = output.update
            self._connection.execute(
                "INSERT OR REPLACE INTO pending (model, document, manifest, sha256, size, at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    update.manifest.name,
                    update.document.model_dump_json(),
                    update.manifest.to_bytes(),
                    update.blob.sha256,
                    update.blob.size,
                    update.at,
                ),
            )
        elif isinstance(output, DropPending):
            self._connection.execute("DELETE FROM pending WHERE model = ?", (output.model,))
        elif isinstance(output, ForgetVersion):
            self._connection.execute("DELETE FROM versions WHERE sha256 = ?", (output.sha256,))
        else:
            assert_never(output)

    def _save_version(self, output: SaveVersion) -> None:
        # What is served, and what failed, has an order; the last one that was served is.
        ordered = int(output.status in (VersionStatus.GOOD, VersionStatus.BAD))
        manifest = output.manifest
        self._connection.execute(
            "INSERT INTO versions (sha256, model, version, document, manifest, status, reason, served)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ? * (SELECT coalesce(max(served), 0) + 1 FROM versions))"
            " ON CONFLICT (sha256) DO UPDATE"
            " SET status = excluded.status, reason = excluded.reason, served = excluded.served",
            (
                output.document.digest.hex(),
                manifest.name,
                manifest.version,
                output.document.model_dump_json(),
                manifest.to_bytes(),
                output.status.value,
                output.reason,
                ordered,
            ),
        )

    def _save_round(self, record: RoundRecord, at: int) -> None:
        phase, client = dump_state(record.client)
        self._connection.execute(
            "INSERT INTO rounds (round_id, joined_at, phase, plan, manifest, client, upload_sha256,"
            " upload_size, uploaded) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (round_id) DO UPDATE"
            " SET phase = excluded.phase, client = excluded.client, upload_sha256 = excluded.upload_sha256,"
            " upload_size = excluded.upload_size, uploaded = excluded.uploaded",
            (
                record.client.context.round_id,
                at,
                phase,
                record.document.model_dump_json(),
                _manifest_bytes(record.assignment),
                client,
                record.upload.sha256 if record.upload else None,
                record.upload.size if record.upload else None,
                int(record.uploaded),
            ),
        )

    # --- reading -----------------------------------------------------------------------------------------

    def load(self) -> Memory:
        """Everything that the core needs to go on where the last process stopped.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the database"):
            active = self._active()
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

    def _active(self) -> RoundRecord | None:
        row = self._connection.execute(
            "SELECT plan, manifest, phase, client, upload_sha256, upload_size, uploaded FROM rounds"
            " WHERE client IS NOT NULL"
        ).fetchone()
        if row is None:
            return None
        plan, manifest, phase, client, sha256, size, uploaded = row
        try:
            document = SignedDocument.model_validate_json(plan)
            return RoundRecord(
                document=document,
                assignment=assignment_of(
                    Plan.from_bytes(document.payload).task,
                    None if manifest is None else ModelManifest.from_bytes(manifest),
                ),
                client=load_state(phase, client),
                upload=BlobRef(sha256=sha256, size=size) if sha256 else None,
                uploaded=bool(uploaded),
            )
        except (ValueError, KeyError, MalformedMessage):
            # Written by a client that kept rounds otherwise. Leaving one is always safe; its id stays used.
            _LOG.warning("unreadable-round phase=%s", phase)
            return None

    def versions(self) -> tuple[StoredVersion, ...]:
        """Every version this device remembers; a good one whose files are gone is a candidate again.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the versions"):
            served = "served" if self._schema() >= 3 else "0"
            rows = self._connection.execute(
                f"SELECT document, manifest, status, reason, {served} AS served FROM versions"  # noqa: S608
                " ORDER BY model, served, version"
            ).fetchall()
        versions = []
        for document, data, stored, reason, order in rows:
            try:
                signed = SignedDocument.model_validate_json(document)
                manifest, status = ModelManifest.from_bytes(data), VersionStatus(stored)
            except ValueError:
                # Written by a client that knew other manifests: it is announced again, if it still counts.
                _LOG.warning("unreadable-version")
                continue
            whole = self.blobs.has(manifest.graph) and self.blobs.has(manifest.weights)
            if status is VersionStatus.GOOD and not whole:
                status = VersionStatus.CANDIDATE
            versions.append(StoredVersion(signed, manifest, status, reason, order))
        return tuple(versions)

    def _schema(self) -> int:
        """Of the database: an older one, as long as it is only read."""
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def standings(self) -> tuple[StoredStanding, ...]:
        """What this device was told to have, as the fleet and by itself.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading what is assigned"):
            if self._schema() < 3:
                return ()
            rows = self._connection.execute("SELECT assignment, manifest FROM standings").fetchall()
        standings = []
        for text, manifest in rows:
            try:
                document = SignedDocument.model_validate_json(text)
                assignment = VersionAssignment.from_bytes(document.payload)
                version = None
                if manifest is not None:
                    signed = SignedDocument.model_validate_json(manifest)
                    version = Version(signed, ModelManifest.from_bytes(signed.payload))
            except (ValueError, MalformedMessage):
                # Written by a client that knew others: it is announced again, if it still counts.
                _LOG.warning("unreadable-assignment")
                continue
            standings.append(StoredStanding(assignment, version))
        return tuple(standings)

    def local(self) -> tuple[SaveLocal, ...]:
        """This device's local parameters, by model.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the local parameters"):
            if self._schema() < 2:
                return ()  # read-only, and no newer process has written yet
            rows = self._connection.execute("SELECT model, layout, sha256, size FROM local").fetchall()
        return tuple(SaveLocal(model, layout, BlobRef(sha256=a, size=n)) for model, layout, a, n in rows)

    def pending(self) -> tuple[PendingUpdate, ...]:
        """The updates that wait for a buffer, by model.

        Raises:
            StorageError: the database cannot be read.
        """
        with _typed_errors("reading the pending updates"):
            if self._schema() < 4:
                return ()
            rows = self._connection.execute(
                "SELECT document, manifest, sha256, size, at FROM pending ORDER BY model"
            ).fetchall()
        found = []
        for text, manifest, sha256, size, at in rows:
            try:
                document = SignedDocument.model_validate_json(text)
                plan, version = Plan.from_bytes(document.payload), ModelManifest.from_bytes(manifest)
            except (ValueError, MalformedMessage):
                # Written by a client that knew other orders: it trains anew.
                _LOG.warning("unreadable-pending-update")
                continue
            blob = BlobRef(sha256=sha256, size=size)
            found.append(PendingUpdate(document, plan, version, blob, at))
        return tuple(found)

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


def _manifest_bytes(assignment: Assignment) -> bytes | None:
    return None if isinstance(assignment, Answering) else assignment.manifest.to_bytes()


@contextlib.contextmanager
def _typed_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        raise (StorageFull if full else StorageError)(28 if full else 5, f"{doing}: {error}") from error
