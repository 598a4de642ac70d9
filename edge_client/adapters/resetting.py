"""Makes a device forget: its models, its recordings, its place in the fleet; and its ledger only when told.

Cut off at any point, it is done by doing it again: first the enrolment goes, so that a device that is half
reset takes part in nothing.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from edge_client.adapters.credentials import CA, CERTIFICATE, ENROLMENT, KEY, REQUEST
from edge_client.adapters.files import StorageError, shred, storage_errors, sync_directory
from edge_client.adapters.sources import DIRECTORY
from edge_client.adapters.store import DATABASE, DeviceStore

_PUBLIC = (ENROLMENT, CERTIFICATE, CA, REQUEST)
_LEARNT = ("blobs", "partial", "uploads", "local", "pending", "personal", "uses")


def reset_recordings(state: Path) -> tuple[str, ...]:
    """Deletes what the sources of `edge.toml` recorded, while no client runs; returns their names.

    Raises:
        StorageError: deleting failed.
    """
    names = tuple(sorted(path.name for path in (state / DIRECTORY).glob("*") if path.is_dir()))
    _remove(state / DIRECTORY)
    return names


def reset_device(state: Path, *, keep_identity: bool, forget_ledger: bool) -> None:
    """Deletes all but the owner's rules, the ledger and the ids of rounds, while no client runs.

    The ids stay with the ledger: with them no round can be entered twice.

    Args:
        state: the state directory.
        keep_identity: leave key and enrolment: the device stays in its fleet, and gets its models anew.
        forget_ledger: delete the ledger and the ids, too.

    Raises:
        StorageError: deleting failed; doing it again goes on.
    """
    if not keep_identity:
        with storage_errors("deleting the identity"):
            for name in _PUBLIC:
                (state / name).unlink(missing_ok=True)
            sync_directory(state)
        if (state / KEY).exists():
            shred(state / KEY)
    if (state / DATABASE).exists():
        if forget_ledger:
            with storage_errors("deleting the ledger"):
                # The log first: left alone, it would be played into the next database.
                for suffix in ("-wal", "-shm", ""):
                    (state / f"{DATABASE}{suffix}").unlink(missing_ok=True)
        else:
            _forget_all_but_the_ledger(state)
    for name in (*_LEARNT, DIRECTORY):
        _remove(state / name)
    with storage_errors("deleting the state"):
        sync_directory(state)


def _forget_all_but_the_ledger(state: Path) -> None:
    # Brings an older database up to date first.
    DeviceStore.open(state).close()
    try:
        with closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.executescript(
                "BEGIN IMMEDIATE; DELETE FROM versions; DELETE FROM standings; DELETE FROM local;"
                " DELETE FROM pending; UPDATE rounds SET plan = NULL, manifest = NULL, client = NULL,"
                " upload_sha256 = NULL, upload_size = NULL, outcome = coalesce(outcome, 'reset'); COMMIT;"
            )
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        raise StorageError(5, f"resetting the database: {error}") from error


def _remove(directory: Path) -> None:
    with storage_errors(f"deleting {directory.name}"), suppress(FileNotFoundError):
        shutil.rmtree(directory)
