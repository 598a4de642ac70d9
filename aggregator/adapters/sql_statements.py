"""One connection's statements, as the parts of the SQL repository make them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, CursorResult, Executable, Row, Select, Table, insert, select
from sqlalchemy.exc import IntegrityError

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_engine import reason
from aggregator.repository import Conflict, NotFound


class Reading:
    """Queries in a transaction."""

    def __init__(self, connection: Connection) -> None:
        """Takes the connection, whose transaction has begun."""
        self._connection = connection

    def _one(self, query: Select[Any]) -> Row[Any] | None:
        return self._connection.execute(query).one_or_none()

    def _all(self, query: Select[Any]) -> list[Row[Any]]:
        return list(self._connection.execute(query))


class Writing(Reading):
    """Changes in a transaction."""

    def _insert(self, table: Table, **values: object) -> None:
        try:
            self._connection.execute(insert(table).values(**values))
        except IntegrityError as error:
            raise Conflict(f"{table.name}: {reason(error)}") from error

    def _change(self, statement: Executable, missing: str) -> None:
        result = self._connection.execute(statement)
        if isinstance(result, CursorResult) and result.rowcount == 0:
            raise NotFound(missing)

    def _require_running(self, round_id: str) -> None:
        query = select(s.rounds.c.status).where(s.rounds.c.round_id == round_id)
        if self._connection.scalars(query).one_or_none() != "running":
            raise NotFound(f"no round {round_id} is running")


def without_seq(row: Row[Any]) -> dict[str, Any]:
    """The columns of a row by name, but for the one that only orders rows."""
    return {name: value for name, value in row._asdict().items() if name != "seq"}
