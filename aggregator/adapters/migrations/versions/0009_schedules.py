"""When the next round of a campaign is due."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds it; campaigns in use have no schedule."""
    op.add_column("campaigns", Column("due_at", Float))
