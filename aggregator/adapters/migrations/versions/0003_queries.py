"""Rounds without a model: queries."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Integer, String

revision = "0003"
down_revision = "0002"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Lets the model of a campaign, a round and a ledger entry be absent."""
    for table in ("campaigns", "rounds", "privacy_ledger"):
        with op.batch_alter_table(table) as batch:
            batch.alter_column("model", existing_type=NAME, nullable=True)
            if table == "rounds":
                batch.alter_column("base_version", existing_type=Integer, nullable=True)
