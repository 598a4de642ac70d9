"""How an SQL database is opened, so that a transaction keeps the promises of `aggregator.repository`.

A writer takes the one write lock before its first look at the data, on either database: two writers wait for
each other and never both read first and then fail. SQLite locks with BEGIN IMMEDIATE. PostgreSQL fixes the
view of a REPEATABLE READ transaction at its first query, but not at LOCK TABLE (its manual, under LOCK); so
whoever holds the lock sees all that was committed before, and writers that lock never fail to serialise.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from aggregator.repository import StorageUnavailable

WAIT_SECONDS = 15
"""How long a writer waits for another one."""
LOG_PATIENCE_MILLISECONDS = 100
MODE = "covey_mode"
"""Execution option of a connection: its `Mode`, READ when it is not given."""
MIGRATION_LOCK = 0x636F766579_01
"""Advisory lock of PostgreSQL: a migration waits for another one."""


class Mode(Enum):
    """What a transaction is going to do."""

    READ = "read"
    WRITE = "write"
    MIGRATE = "migrate"


_CONTENTION = frozenset({"40001", "40P01", "55P03", "57014"})
"""PostgreSQL: serialization_failure, deadlock_detected, lock_not_available, query_canceled."""

_POSTGRESQL_SESSION = {
    # A receipt says "durable", whatever the server's default is.
    "synchronous_commit": "on",
    "lock_timeout": f"{WAIT_SECONDS}s",
    # The lock of an aggregator whose machine is gone is free again after about a minute.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}


def url_of_file(path: Path) -> str:
    """The URL of the SQLite database in a file."""
    return URL.create("sqlite", database=str(path.absolute())).render_as_string()


def parse_url(url: str) -> URL:
    """Reads the URL of a database; `postgresql://` means psycopg.

    Raises:
        StorageUnavailable: it is no URL of a database that Covey knows. The message does not quote it.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Without the cause: it may quote a password.
        raise StorageUnavailable(
            "the database URL cannot be read: write postgresql://user@host/name"
        ) from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise StorageUnavailable(f"Covey stores in SQLite or PostgreSQL, not in {backend}")
    return parsed


def without_password(url: str) -> str:
    """The URL of a database as it may be stored and shown.

    Raises:
        StorageUnavailable: it is no URL of a database that Covey knows.
    """
    # URL.set would take None for "as before".
    return parse_url(url)._replace(password=None).render_as_string(hide_password=False)


def open_engine(url: str, *, references: bool = True) -> Engine:
    """Makes the engine of a database URL.

    Args:
        url: of a SQLite or PostgreSQL database.
        references: whether SQLite enforces foreign keys; a migration rebuilds tables and checks them itself.

    Raises:
        StorageUnavailable: it is no such URL, or the driver is not installed.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": WAIT_SECONDS})
        event.listen(engine, "connect", partial(_configure_sqlite, references))
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    settings = " ".join(f"-c {name}={value}" for name, value in _POSTGRESQL_SESSION.items())
    try:
        engine = create_engine(
            parsed,
            isolation_level="REPEATABLE READ",
            # After a restart of the server, connections that were open before it are replaced unnoticed.
            pool_pre_ping=True,
            connect_args={"options": settings, "connect_timeout": WAIT_SECONDS},
        )
    except ImportError as error:
        raise StorageUnavailable("PostgreSQL needs a driver: pip install 'covey[postgres]'") from error
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _configure_sqlite(references: bool, connection: Any, _record: object) -> None:
    # The driver must not start transactions by itself: see `_begin_sqlite`.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        # A receipt says "durable": every commit is synced, not only checkpoints.
        "synchronous = FULL",
        f"foreign_keys = {'ON' if references else 'OFF'}",
        # Shares and masked inputs are overwritten when they are deleted.
        "secure_delete = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN" if _mode(connection) is Mode.READ else "BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    mode = _mode(connection)
    if mode is Mode.READ:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    elif mode is Mode.WRITE:
        # The lock ends with the transaction; readers do not wait for it.
        connection.exec_driver_sql("LOCK TABLE meta IN EXCLUSIVE MODE")
    else:
        # There may be no table yet. What this one waited for it must see, or it would do it again.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")


def _mode(connection: Connection) -> Mode:
    mode = connection.get_execution_options().get(MODE, Mode.READ)
    assert isinstance(mode, Mode)  # noqa: S101 - a misspelt option must not write without the lock
    return mode


def erase_log(engine: Engine) -> None:
    """Empties SQLite's write-ahead log, which still holds what was overwritten in the database itself.

    Nothing is waited for: while somebody reads an older state, the log stays until the next time.
    """
    if engine.dialect.name != "sqlite":
        return
    with suppress(DBAPIError, sqlite3.Error), closing(engine.raw_connection()) as pooled:
        cursor = pooled.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {LOG_PATIENCE_MILLISECONDS}")
        try:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {WAIT_SECONDS * 1000}")


def contended(error: SQLAlchemyError) -> bool:
    """Whether the database gave up because of somebody else: the same transaction may succeed later."""
    if not isinstance(error, DBAPIError):
        return False
    if getattr(error.orig, "sqlstate", None) in _CONTENTION:
        return True
    return getattr(error.orig, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def reason(error: SQLAlchemyError) -> str:
    """What went wrong, in one line. Never `str(error)`: it quotes the parameters of the statement."""
    if not isinstance(error, DBAPIError):
        return f"database: {type(error).__name__}"
    # PostgreSQL quotes whole rows in the details below its message.
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    if primary is None:
        primary = str(error.orig).partition("\n")[0]
        if primary.startswith("connection failed: "):
            # Of a failed connection, without the server's address.
            primary = f"no connection: {primary.rpartition(' failed: ')[2]}"
    return f"database: {primary}"
