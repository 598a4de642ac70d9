"""Tokens, labels of devices, and an audit log that the database itself keeps from being rewritten."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Integer, LargeBinary, String, Text

revision = "0002"
down_revision = "0001"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")
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


def upgrade() -> None:
    """Adds them."""
    op.add_column("devices", Column("labels", Text, nullable=False, server_default="[]"))
    op.create_table(
        "tokens",
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
    op.create_table(
        "audit_log",
        Column("seq", Integer, primary_key=True),
        Column("at", Float, nullable=False),
        Column("who", Text, nullable=False),
        Column("role", String(16), nullable=False),
        Column("address", Text, nullable=False),
        Column("action", NAME, nullable=False),
        Column("target", Text, nullable=False),
        Column("outcome", NAME, nullable=False),
        sqlite_autoincrement=True,
    )
    for statement in APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)
