"""What devices said of their circumstances."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Text

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds them; of devices in use nothing is known until they speak again."""
    op.add_column("devices", Column("conditions", Text, nullable=False, server_default="{}"))
