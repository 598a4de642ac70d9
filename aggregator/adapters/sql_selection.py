"""The part of the SQL repository that holds how cohorts were drawn, and who has trained."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import IntegrityError

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_engine import reason
from aggregator.repository import Conflict


class SelectionReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def selection(self, round_id: str) -> bytes | None:
        """How the cohort of a round was drawn."""
        query = select(s.selections.c.record).where(s.selections.c.round_id == round_id)
        return self._connection.scalars(query).one_or_none()

    def contributors(self, model: str) -> frozenset[str]:
        """The devices whose contribution is in any version of a model."""
        query = select(s.contributors.c.device_id).where(s.contributors.c.model == model)
        return frozenset(self._connection.scalars(query))


class SelectionWriter(SelectionReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def note_selection(self, round_id: str, record: bytes) -> None:
        """Keeps how the cohort of a round was drawn."""
        try:
            self._connection.execute(insert(s.selections).values(round_id=round_id, record=record))
        except IntegrityError as error:
            raise Conflict(f"selections: {reason(error)}") from error

    def forget_selections(self, before: float, limit: int) -> int:
        """Deletes those of rounds that ended before."""
        ended = (
            select(s.selections.c.round_id)
            .join(s.rounds, s.rounds.c.round_id == s.selections.c.round_id)
            .where(s.rounds.c.ended_at < before)
            .order_by(s.rounds.c.seq)
            .limit(limit)
        )
        old = list(self._connection.scalars(ended))
        if old:
            self._connection.execute(delete(s.selections).where(s.selections.c.round_id.in_(old)))
        return len(old)
