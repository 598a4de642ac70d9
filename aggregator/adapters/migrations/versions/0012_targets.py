"""The system that each device's client bundle is for."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, String

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Adds it; of devices in use nothing is known until they speak again."""
    op.add_column("devices", Column("target", String(63), nullable=False, server_default=""))
