"""The tables of the device's database, and how an older one becomes the present one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge_client.adapters.files import StorageError

APPLICATION_ID = 0x436F7665  # "Cove"
SCHEMA_VERSION = 4

_SCHEMA = """
CREATE TABLE rounds (
    round_id TEXT PRIMARY KEY,
    joined_at INTEGER NOT NULL,
    phase TEXT NOT NULL,
    outcome TEXT,
    closed_at INTEGER,
    plan TEXT,
    manifest BLOB,
    client BLOB,
    upload_sha256 TEXT,
    upload_size INTEGER,
    uploaded INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX one_active_round ON rounds (client IS NOT NULL) WHERE client IS NOT NULL;
CREATE TABLE ledger (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    round_id TEXT NOT NULL UNIQUE,
    at INTEGER NOT NULL,
    entry TEXT NOT NULL
) STRICT;
CREATE TABLE versions (
    sha256 TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    version INTEGER NOT NULL,
    document TEXT NOT NULL,
    manifest BLOB NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('candidate', 'good', 'bad')),
    reason TEXT NOT NULL DEFAULT ''
) STRICT, WITHOUT ROWID;
"""
_SINCE_2 = """
CREATE TABLE local (
    model TEXT PRIMARY KEY,
    layout TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
# SQLite cannot change a CHECK: the table is made anew.
_SINCE_3 = """
CREATE TABLE served_versions (
    sha256 TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    version INTEGER NOT NULL,
    document TEXT NOT NULL,
    manifest BLOB NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('candidate', 'good', 'bad', 'base')),
    reason TEXT NOT NULL DEFAULT '',
    served INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
INSERT INTO served_versions (sha256, model, version, document, manifest, status, reason)
    SELECT sha256, model, version, document, manifest, status, reason FROM versions;
DROP TABLE versions;
ALTER TABLE served_versions RENAME TO versions;
CREATE TABLE standings (
    model TEXT NOT NULL,
    own INTEGER NOT NULL,
    assignment TEXT NOT NULL,
    manifest TEXT,
    PRIMARY KEY (model, own)
) STRICT, WITHOUT ROWID;
"""
_SINCE_4 = """
CREATE TABLE pending (
    model TEXT PRIMARY KEY,
    document TEXT NOT NULL,
    manifest BLOB NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


class UnknownSchema(StorageError):
    """The database was made by another version of the client: it is left as it is."""


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Looks whether this client knows the database; an empty file and older schemas are known.

    Raises:
        UnknownSchema: it does not.
    """
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if (application == APPLICATION_ID and 1 <= version <= SCHEMA_VERSION) or empty:
        return
    raise UnknownSchema(
        1,
        f"{path} has schema {version} of application {application:#x}, this client knows "
        f"{SCHEMA_VERSION}: update the client, or start with another state directory",
    )


def configure(connection: sqlite3.Connection) -> None:
    """Sets a writer's connection up, and brings the tables up to date."""
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} {_SINCE_2} {_SINCE_3} {_SINCE_4}"
            f" PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
        return
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    steps = [step for since, step in ((2, _SINCE_2), (3, _SINCE_3), (4, _SINCE_4)) if version < since]
    if steps:
        connection.executescript(
            f"BEGIN IMMEDIATE; {' '.join(steps)} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
