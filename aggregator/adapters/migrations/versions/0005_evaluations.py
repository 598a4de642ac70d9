"""How versions did on the devices."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, ForeignKey, Integer, LargeBinary, String

revision = "0005"
down_revision = "0004"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds them."""
    op.create_table(
        "evaluations",
        Column("seq", Integer, primary_key=True),
        Column("round_id", String(32), ForeignKey("rounds.round_id"), nullable=False, unique=True),
        Column("model", NAME, nullable=False),
        Column("version", Integer, nullable=False),
        Column("at", Float, nullable=False),
        Column("figures", LargeBinary, nullable=False),
    )
    op.create_index("evaluations_version", "evaluations", ["model", "version"])
