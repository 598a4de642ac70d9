"""Tables of the SQL repository, and how a database is opened and recognised."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    DDL,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
)

from aggregator.repository import UnknownSchema

SCHEMA_VERSION = 2
BUSY_SECONDS = 15
WRITE = "covey_write"
"""Execution option of a connection that is going to write."""

metadata = MetaData()

meta = Table(
    "meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False)
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", String(63), primary_key=True),
    Column("certificate", LargeBinary, nullable=False),
    Column("enrolled_at", Float, nullable=False),
    Column("excluded", Text),
    Column("online", Boolean, nullable=False),
    Column("client_version", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("last_seen", Float),
    Column("labels", Text, nullable=False, server_default="[]"),
)

versions = Table(
    "versions",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    # Unique: a round that is finished twice, after a crash, cannot publish twice.
    Column("round_id", String(32), unique=True),
)

campaigns = Table(
    "campaigns",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("campaign_id", String(32), nullable=False, unique=True),
    Column("model", String(63), nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("settings", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("started", Integer, nullable=False),
    Column("note", Text, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", String(32), nullable=False, unique=True),
    Column("campaign_id", ForeignKey("campaigns.campaign_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", String(63), nullable=False),
    Column("base_version", Integer, nullable=False),
    Column("plan", LargeBinary, nullable=False),
    Column("selection_seed", LargeBinary, nullable=False),
    Column("invited", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("status", String(16), nullable=False),
    Column("code", String(40), nullable=False),
    Column("detail", Text, nullable=False),
    Column("version", Integer),
    Column("report", LargeBinary, nullable=False),
    UniqueConstraint("campaign_id", "number"),
    Index("rounds_status", "status"),
)

log = Table(
    "round_log",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("device_id", String(63), nullable=False),
    Column("frame", LargeBinary, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("device_id", String(63), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("size", Integer, nullable=False),
)

chunks = Table(
    "chunks",
    metadata,
    Column("round_id", String(32), primary_key=True),
    Column("device_id", String(63), primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

inputs = Table(
    "inputs",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("device_id", String(63), primary_key=True),
    Column("sha256", String(64), nullable=False),
)

sums = Table(
    "partial_sums",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("start", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

ledger = Table(
    "privacy_ledger",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, unique=True),
    Column("model", String(63), nullable=False),
    Column("at", Float, nullable=False),
    Column("event", LargeBinary, nullable=False),
)

transcripts = Table(
    "transcripts",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, index=True),
    Column("record", LargeBinary, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("token_id", String(12), nullable=False, unique=True),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("role", String(16), nullable=False),
    Column("label", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("revoked_at", Float),
)

audit = Table(
    "audit_log",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("who", Text, nullable=False),
    Column("role", String(16), nullable=False),
    Column("address", Text, nullable=False),
    Column("action", String(63), nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", String(63), nullable=False),
    sqlite_autoincrement=True,
)

APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER audit_log_no_{verb.lower()} BEFORE {verb} ON audit_log "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ),
    "postgresql": (
        "CREATE FUNCTION audit_log_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$",
        "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_refuse()",
    ),
}
"""What the database itself refuses, whoever asks it, by dialect."""
for _dialect, _statements in APPEND_ONLY.items():
    for _statement in _statements:
        _ddl = DDL(_statement)  # type: ignore[no-untyped-call]
        event.listen(audit, "after_create", _ddl.execute_if(dialect=_dialect))


def open_engine(url: str) -> Engine:
    """Makes the engine of a database URL; SQLite gets the settings that make a commit durable."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, isolation_level="SERIALIZABLE")
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver must not start transactions by itself: a writer takes its lock when it begins, so that two
    # never both read first and then fail.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        # A receipt says "durable": every commit is synced, not only checkpoints.
        "synchronous = FULL",
        "foreign_keys = ON",
        # Shares and masked inputs are overwritten when they are deleted.
        "secure_delete = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get(WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def prepare(engine: Engine) -> None:
    """Creates the tables in an empty database, or checks that the ones there are ours.

    Raises:
        UnknownSchema: they are of another schema version.
    """
    with engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
        names = inspect(connection).get_table_names()
        if not names:
            metadata.create_all(connection)
            connection.execute(insert(meta).values(key="schema_version", value=str(SCHEMA_VERSION)))
            return
        found = "none"
        if "meta" in names:
            query = select(meta.c.value).where(meta.c.key == "schema_version")
            found = connection.execute(query).scalar_one_or_none() or "none"
        if found != str(SCHEMA_VERSION):
            raise UnknownSchema(
                f"the database has schema version {found}, this Covey knows {SCHEMA_VERSION}: "
                "run the Covey version that made it, or migrate a copy of the state directory"
            )
