"""How cohorts were drawn, and who has trained a model."""

from __future__ import annotations

import json

from alembic import op
from sqlalchemy import Column, ForeignKey, LargeBinary, String, column, insert, select, table

revision = "0007"
down_revision = "0006"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds both; who has trained follows from the reports, how earlier cohorts were drawn from nothing."""
    op.create_table(
        "selections",
        Column("round_id", String(32), ForeignKey("rounds.round_id"), primary_key=True),
        Column("record", LargeBinary, nullable=False),
    )
    contributors = op.create_table(
        "contributors",
        Column("model", NAME, primary_key=True),
        Column("device_id", NAME, primary_key=True),
    )
    rounds = table("rounds", column("model"), column("report"), column("version"))
    connection = op.get_bind()
    query = select(rounds.c.model, rounds.c.report).where(rounds.c.version.is_not(None))
    found = {
        (row.model, device_id)
        for row in connection.execute(query)
        for device_id in json.loads(bytes(row.report)).get("survivors", ())
    }
    if found:
        rows = [{"model": model, "device_id": device_id} for model, device_id in sorted(found)]
        connection.execute(insert(contributors), rows)
