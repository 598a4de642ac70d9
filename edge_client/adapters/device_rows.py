"""The rows of the device's database: what is made durable as rows, and rows as what the core knows.

A row that another version of the client wrote, and that this one cannot read, is left out: the fleet says
again what still counts.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import assert_never

from edge_client.adapters.blobs import Blobs
from edge_client.client_updates import ToldClient
from edge_client.durable import (
    CloseRound,
    DropPending,
    ForgetVersion,
    PendingUpdate,
    RoundRecord,
    SaveContribution,
    SaveLocal,
    SavePending,
    SaveRound,
    SaveStanding,
    SaveVersion,
    VersionStatus,
)
from edge_client.library import StoredStanding, StoredVersion, Version
from models.assignment import Answering, Assignment, assignment_of
from models.manifest import ModelManifest
from protocol.client_release import CLIENT, ClientRelease
from protocol.errors import MalformedMessage
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.secagg.client_state import dump_state, load_state
from protocol.version_assignment import VersionAssignment

_LOG = logging.getLogger("covey.edge.store")


def write(
    connection: sqlite3.Connection,
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
    """Makes an output rows, in the transaction that is open.

    Raises:
        sqlite3.Error: the database fails.
    """
    if isinstance(output, SaveRound):
        _save_round(connection, output.record, output.at)
    elif isinstance(output, SaveContribution):
        entry = output.entry
        connection.execute(
            "INSERT INTO ledger (round_id, at, entry) VALUES (?, ?, ?)",
            (entry.round_id, entry.at, entry.model_dump_json()),
        )
    elif isinstance(output, CloseRound):
        connection.execute(
            "UPDATE rounds SET outcome = ?, closed_at = ?, plan = NULL, manifest = NULL, client = NULL,"
            " upload_sha256 = NULL, upload_size = NULL WHERE round_id = ?",
            (output.outcome, output.at, output.round_id),
        )
    elif isinstance(output, SaveVersion):
        _save_version(connection, output)
    elif isinstance(output, SaveStanding):
        assignment, manifest = output.assignment, output.manifest
        connection.execute(
            "INSERT OR REPLACE INTO standings (model, own, assignment, manifest) VALUES (?, ?, ?, ?)",
            (
                assignment.model,
                int(assignment.device is not None),
                output.document.model_dump_json(),
                None if manifest is None else manifest.model_dump_json(),
            ),
        )
    elif isinstance(output, SaveLocal):
        connection.execute(
            "INSERT OR REPLACE INTO local (model, layout, sha256, size) VALUES (?, ?, ?, ?)",
            (output.model, output.layout, output.blob.sha256, output.blob.size),
        )
    elif isinstance(output, SavePending):
        update = output.update
        connection.execute(
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
        connection.execute("DELETE FROM pending WHERE model = ?", (output.model,))
    elif isinstance(output, ForgetVersion):
        connection.execute("DELETE FROM versions WHERE sha256 = ?", (output.sha256,))
    else:
        assert_never(output)


def _save_version(connection: sqlite3.Connection, output: SaveVersion) -> None:
    # What is served, and what failed, has an order; the last one that was served is.
    ordered = int(output.status in (VersionStatus.GOOD, VersionStatus.BAD))
    manifest = output.manifest
    connection.execute(
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


def _save_round(connection: sqlite3.Connection, record: RoundRecord, at: int) -> None:
    phase, client = dump_state(record.client)
    connection.execute(
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


def _manifest_bytes(assignment: Assignment) -> bytes | None:
    return None if isinstance(assignment, Answering) else assignment.manifest.to_bytes()


def active_round(connection: sqlite3.Connection) -> RoundRecord | None:
    """The round that this device is in, if it can still be read.

    Raises:
        sqlite3.Error: the database fails.
    """
    row = connection.execute(
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


def versions(connection: sqlite3.Connection, blobs: Blobs) -> tuple[StoredVersion, ...]:
    """Every version this device remembers; a good one whose files are gone is a candidate again.

    Raises:
        sqlite3.Error: the database fails.
    """
    served = "served" if _schema(connection) >= 3 else "0"
    rows = connection.execute(
        f"SELECT document, manifest, status, reason, {served} AS served FROM versions"  # noqa: S608
        " ORDER BY model, served, version"
    ).fetchall()
    found = []
    for document, data, stored, reason, order in rows:
        try:
            signed = SignedDocument.model_validate_json(document)
            manifest, status = ModelManifest.from_bytes(data), VersionStatus(stored)
        except ValueError:
            # Written by a client that knew other manifests: it is announced again, if it still counts.
            _LOG.warning("unreadable-version")
            continue
        whole = blobs.has(manifest.graph) and blobs.has(manifest.weights)
        if status is VersionStatus.GOOD and not whole:
            status = VersionStatus.CANDIDATE
        found.append(StoredVersion(signed, manifest, status, reason, order))
    return tuple(found)


def standings(connection: sqlite3.Connection) -> tuple[StoredStanding, ...]:
    """What this device was told to have, as the fleet and by itself.

    Raises:
        sqlite3.Error: the database fails.
    """
    if _schema(connection) < 3:
        return ()
    rows = connection.execute("SELECT assignment, manifest FROM standings").fetchall()
    found = []
    for text, manifest in rows:
        try:
            document = SignedDocument.model_validate_json(text)
            assignment = VersionAssignment.from_bytes(document.payload)
            if assignment.model == CLIENT:
                continue
            version = None
            if manifest is not None:
                signed = SignedDocument.model_validate_json(manifest)
                version = Version(signed, ModelManifest.from_bytes(signed.payload))
        except (ValueError, MalformedMessage):
            # Written by a client that knew others: it is announced again, if it still counts.
            _LOG.warning("unreadable-assignment")
            continue
        found.append(StoredStanding(assignment, version))
    return tuple(found)


def client(connection: sqlite3.Connection) -> tuple[ToldClient, ...]:
    """Which client this device was told to have, as the fleet and by itself.

    Raises:
        sqlite3.Error: the database fails.
    """
    if _schema(connection) < 3:
        return ()
    found = []
    rows = connection.execute("SELECT assignment, manifest FROM standings WHERE model = ?", (CLIENT,))
    for text, manifest in rows.fetchall():
        try:
            document = SignedDocument.model_validate_json(text)
            assignment = VersionAssignment.from_bytes(document.payload)
            signed = None if manifest is None else SignedDocument.model_validate_json(manifest)
            release = None if signed is None else ClientRelease.from_bytes(signed.payload)
        except (ValueError, MalformedMessage):
            _LOG.warning("unreadable-assignment")
            continue
        found.append(ToldClient(assignment, document, release, signed))
    return tuple(found)


def local(connection: sqlite3.Connection) -> tuple[SaveLocal, ...]:
    """This device's local parameters, by model.

    Raises:
        sqlite3.Error: the database fails.
    """
    if _schema(connection) < 2:
        return ()  # read-only, and no newer process has written yet
    rows = connection.execute("SELECT model, layout, sha256, size FROM local").fetchall()
    return tuple(SaveLocal(model, layout, BlobRef(sha256=a, size=n)) for model, layout, a, n in rows)


def pending(connection: sqlite3.Connection) -> tuple[PendingUpdate, ...]:
    """The updates that wait for a buffer, by model.

    Raises:
        sqlite3.Error: the database fails.
    """
    if _schema(connection) < 4:
        return ()
    rows = connection.execute(
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


def _schema(connection: sqlite3.Connection) -> int:
    """Of the database: an older one, as long as it is only read."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
