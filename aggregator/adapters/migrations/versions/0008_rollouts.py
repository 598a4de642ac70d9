"""Who has which version: stages, pins, assignments and rollouts."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, String, Text

revision = "0008"
down_revision = "0007"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds them; what was published before was announced to the whole fleet, so it is stable."""
    op.add_column("devices", Column("failures", Text, nullable=False, server_default="{}"))
    op.add_column("versions", Column("stage", String(16), nullable=False, server_default="stable"))
    op.create_table(
        "pins",
        Column("model", NAME, primary_key=True),
        Column("kind", String(16), primary_key=True),
        Column("target", NAME, primary_key=True),
        Column("version", Integer, nullable=False),
        Column("at", Float, nullable=False),
    )
    op.create_table(
        "assigned_versions",
        Column("model", NAME, primary_key=True),
        Column("device_id", NAME, primary_key=True),
        Column("sequence", BigInteger, nullable=False),
        Column("version", Integer),
        Column("document", LargeBinary, nullable=False),
    )
    op.create_table(
        "rollouts",
        Column("seq", Integer, primary_key=True),
        Column("rollout_id", String(32), nullable=False, unique=True),
        Column("model", NAME, nullable=False),
        Column("version", Integer, nullable=False),
        Column("settings", LargeBinary, nullable=False),
        Column("pool", Text, nullable=False),
        Column("created_at", Float, nullable=False),
        Column("status", String(16), nullable=False),
        Column("progress", LargeBinary, nullable=False),
    )
    op.create_index("rollouts_status", "rollouts", ["status"])
