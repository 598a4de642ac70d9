"""The part of the SQL repository that holds tokens and the audit log."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from aggregator.access.roles import Role
from aggregator.access.tokens import TokenRecord
from aggregator.adapters import sql_schema as s
from aggregator.records import AuditEntry
from aggregator.repository import Conflict, NotFound


class AccessReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def token(self, token_id: str) -> TokenRecord | None:
        """One token."""
        row = self._connection.execute(select(s.tokens).where(s.tokens.c.token_id == token_id)).one_or_none()
        return None if row is None else _token(row)

    def tokens(self) -> tuple[TokenRecord, ...]:
        """Every token."""
        return tuple(
            _token(row) for row in self._connection.execute(select(s.tokens).order_by(s.tokens.c.seq))
        )

    def audit(self, *, before: int | None = None, limit: int = 100) -> tuple[AuditEntry, ...]:
        """Entries, newest first."""
        query = select(s.audit).order_by(s.audit.c.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(s.audit.c.seq < before)
        rows = (row._asdict() for row in self._connection.execute(query))
        return tuple(AuditEntry(number=row.pop("seq"), **row) for row in rows)


class AccessWriter(AccessReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def add_token(self, token: TokenRecord) -> None:
        """Adds a token."""
        try:
            self._connection.execute(insert(s.tokens).values(**vars(token)))
        except IntegrityError as error:
            raise Conflict(f"tokens: {error.orig}") from error

    def revoke_token(self, token_id: str, at: float) -> None:
        """Revokes a token."""
        statement = update(s.tokens).where(s.tokens.c.token_id == token_id)
        first = func.coalesce(s.tokens.c.revoked_at, at)
        if self._connection.execute(statement.values(revoked_at=first)).rowcount == 0:
            raise NotFound(f"no token {token_id}")

    def append_audit(self, entry: AuditEntry) -> None:
        """Appends an entry."""
        values = {name: value for name, value in vars(entry).items() if name != "number"}
        self._connection.execute(insert(s.audit).values(**values))


def _token(row: Any) -> TokenRecord:
    values = {name: value for name, value in row._asdict().items() if name != "seq"}
    return TokenRecord(**(values | {"role": Role(values["role"])}))
