"""The keys of noise trees (DP-FTRL)."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, ForeignKey, Integer, LargeBinary, String

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds them."""
    op.create_table(
        "noise_trees",
        Column("campaign_id", String(32), ForeignKey("campaigns.campaign_id"), primary_key=True),
        Column("tree", String(64), nullable=False),
        Column("key", LargeBinary, nullable=False),
        Column("released", Integer, nullable=False),
    )
