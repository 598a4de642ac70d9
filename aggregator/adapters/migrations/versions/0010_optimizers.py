"""What the server optimizers of campaigns remember."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, ForeignKey, Integer, LargeBinary, String

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Adds it."""
    op.create_table(
        "optimizer_memories",
        Column("campaign_id", String(32), ForeignKey("campaigns.campaign_id"), primary_key=True),
        Column("rounds", Integer, nullable=False),
        Column("momentum", LargeBinary),
        Column("second_moment", LargeBinary),
    )
