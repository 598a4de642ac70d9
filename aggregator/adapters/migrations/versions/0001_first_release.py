"""The tables of Covey's first release."""

from __future__ import annotations

from alembic import op
from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)

revision = "0001"
down_revision = None

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "meta",
        Column("key", String(40), primary_key=True),
        Column("value", Text, nullable=False),
    )
    op.create_table(
        "devices",
        Column("device_id", NAME, primary_key=True),
        Column("certificate", LargeBinary, nullable=False),
        Column("enrolled_at", Float, nullable=False),
        Column("excluded", Text),
        Column("online", Boolean, nullable=False),
        Column("client_version", Text, nullable=False),
        Column("runtime", Text, nullable=False),
        Column("models", Text, nullable=False),
        Column("last_seen", Float),
    )
    op.create_table(
        "versions",
        Column("model", NAME, primary_key=True),
        Column("version", Integer, primary_key=True, autoincrement=False),
        Column("manifest_sha256", String(64), nullable=False),
        Column("document", LargeBinary, nullable=False),
        Column("created_at", Float, nullable=False),
        # Unique: a round that is finished twice, after a crash, cannot publish twice.
        Column("round_id", String(32), unique=True),
    )
    op.create_table(
        "campaigns",
        Column("seq", Integer, primary_key=True),
        Column("campaign_id", String(32), nullable=False, unique=True),
        Column("model", NAME, nullable=False),
        Column("rounds", Integer, nullable=False),
        Column("settings", LargeBinary, nullable=False),
        Column("created_at", Float, nullable=False),
        Column("status", String(16), nullable=False),
        Column("started", Integer, nullable=False),
        Column("note", Text, nullable=False),
    )
    op.create_table(
        "rounds",
        Column("seq", Integer, primary_key=True),
        Column("round_id", String(32), nullable=False, unique=True),
        Column("campaign_id", String(32), ForeignKey("campaigns.campaign_id"), nullable=False),
        Column("number", Integer, nullable=False),
        Column("model", NAME, nullable=False),
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
    op.create_table(
        "round_log",
        Column("seq", Integer, primary_key=True),
        Column("round_id", String(32), ForeignKey("rounds.round_id"), nullable=False, index=True),
        Column("at", Float, nullable=False),
        Column("kind", String(16), nullable=False),
        Column("device_id", NAME, nullable=False),
        Column("frame", LargeBinary, nullable=False),
    )
    op.create_table(
        "uploads",
        Column("round_id", String(32), ForeignKey("rounds.round_id"), primary_key=True),
        Column("device_id", NAME, primary_key=True),
        Column("sha256", String(64), nullable=False),
        Column("size", Integer, nullable=False),
    )
    op.create_table(
        "chunks",
        Column("round_id", String(32), primary_key=True),
        Column("device_id", NAME, primary_key=True),
        Column("index", Integer, primary_key=True, autoincrement=False),
        Column("data", LargeBinary, nullable=False),
    )
    op.create_table(
        "inputs",
        Column("round_id", String(32), ForeignKey("rounds.round_id"), primary_key=True),
        Column("device_id", NAME, primary_key=True),
        Column("sha256", String(64), nullable=False),
    )
    op.create_table(
        "partial_sums",
        Column("round_id", String(32), ForeignKey("rounds.round_id"), primary_key=True),
        Column("start", Integer, primary_key=True, autoincrement=False),
        Column("data", LargeBinary, nullable=False),
    )
    op.create_table(
        "privacy_ledger",
        Column("seq", Integer, primary_key=True),
        Column("round_id", String(32), ForeignKey("rounds.round_id"), nullable=False, unique=True),
        Column("model", NAME, nullable=False),
        Column("at", Float, nullable=False),
        Column("event", LargeBinary, nullable=False),
    )
    op.create_table(
        "transcripts",
        Column("seq", Integer, primary_key=True),
        Column("round_id", String(32), ForeignKey("rounds.round_id"), nullable=False, index=True),
        Column("record", LargeBinary, nullable=False),
    )
