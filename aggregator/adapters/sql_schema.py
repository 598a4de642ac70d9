"""Tables of the SQL repository, as the newest migration leaves them.

To change them: change them here, add `migrations/versions/NNNN_what.py` that does the same to a database in
use, and raise `REVISION`. `tests/contract/test_migrations.py` compares the two on every database.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
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
)

REVISION = "0012"
"""The newest migration: what a database must have to be used."""

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")
"""A `Slug`. In the order of its bytes on every database, whatever language a server was set up for."""

metadata = MetaData()

# One row a fact about the database itself. On PostgreSQL, writers lock it: it is there for all of them.
meta = Table(
    "meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False)
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", NAME, primary_key=True),
    Column("certificate", LargeBinary, nullable=False),
    Column("enrolled_at", Float, nullable=False),
    Column("excluded", Text),
    Column("online", Boolean, nullable=False),
    Column("client_version", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("models", Text, nullable=False),
    Column("last_seen", Float),
    Column("labels", Text, nullable=False, server_default="[]"),
    Column("conditions", Text, nullable=False, server_default="{}"),
    Column("failures", Text, nullable=False, server_default="{}"),
    Column("state", String(16), nullable=False, server_default="active"),
    Column("token_id", String(12)),
    Column("target", String(63), nullable=False, server_default=""),
)

# One row a certificate that was ever issued: a device that was enrolled anew has several.
certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("device_id", ForeignKey("devices.device_id"), nullable=False, index=True),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("reason", Text, nullable=False),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("token_id", String(12), nullable=False, unique=True),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("name", NAME, nullable=False),
    Column("labels", Text, nullable=False),
    Column("replaces", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("revoked_at", Float),
    Column("used_at", Float),
    Column("key_id", String(64)),
    Index("enrolment_tokens_name", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("model", NAME, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    # Unique: a round that is finished twice, after a crash, cannot publish twice.
    Column("round_id", String(32), unique=True),
    Column("stage", String(16), nullable=False, server_default="stable"),
)

pins = Table(
    "pins",
    metadata,
    Column("model", NAME, primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("target", NAME, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

# Rows are replaced and never deleted: a sequence that was used once must not come again.
assigned = Table(
    "assigned_versions",
    metadata,
    Column("model", NAME, primary_key=True),
    Column("device_id", NAME, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("version", Integer),
    Column("document", LargeBinary, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("rollout_id", String(32), nullable=False, unique=True),
    Column("model", NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("settings", LargeBinary, nullable=False),
    Column("pool", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", LargeBinary, nullable=False),
    Index("rollouts_status", "status"),
)

campaigns = Table(
    "campaigns",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("campaign_id", String(32), nullable=False, unique=True),
    Column("model", NAME),
    Column("rounds", Integer, nullable=False),
    Column("settings", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("started", Integer, nullable=False),
    Column("note", Text, nullable=False),
    Column("due_at", Float),
)

noise_trees = Table(
    "noise_trees",
    metadata,
    Column("campaign_id", ForeignKey("campaigns.campaign_id"), primary_key=True),
    Column("tree", String(64), nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("released", Integer, nullable=False),
)

optimizer_memories = Table(
    "optimizer_memories",
    metadata,
    Column("campaign_id", ForeignKey("campaigns.campaign_id"), primary_key=True),
    Column("rounds", Integer, nullable=False),
    Column("momentum", LargeBinary),
    Column("second_moment", LargeBinary),
)

rounds = Table(
    "rounds",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", String(32), nullable=False, unique=True),
    Column("campaign_id", ForeignKey("campaigns.campaign_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", NAME),
    Column("base_version", Integer),
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

evaluations = Table(
    "evaluations",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, unique=True),
    Column("model", NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("figures", LargeBinary, nullable=False),
    Index("evaluations_version", "model", "version"),
)

selections = Table(
    "selections",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("record", LargeBinary, nullable=False),
)

contributors = Table(
    "contributors",
    metadata,
    Column("model", NAME, primary_key=True),
    Column("device_id", NAME, primary_key=True),
)

log = Table(
    "round_log",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("device_id", NAME, nullable=False),
    Column("frame", LargeBinary, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("device_id", NAME, primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("size", Integer, nullable=False),
)

chunks = Table(
    "chunks",
    metadata,
    Column("round_id", String(32), primary_key=True),
    Column("device_id", NAME, primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

inputs = Table(
    "inputs",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True),
    Column("device_id", NAME, primary_key=True),
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
    Column("model", NAME),
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
    Column("action", NAME, nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", NAME, nullable=False),
    sqlite_autoincrement=True,
)
