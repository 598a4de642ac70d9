"""The part of the repository that holds tokens and the audit log."""

from __future__ import annotations

from typing import Protocol

from aggregator.access.tokens import TokenRecord
from aggregator.records import AuditEntry


class AccessReader(Protocol):
    """What can be read of it; see `aggregator.repository`."""

    def token(self, token_id: str) -> TokenRecord | None:
        """One token, revoked or not."""
        ...

    def tokens(self) -> tuple[TokenRecord, ...]:
        """Every token ever made, oldest first."""
        ...

    def audit(self, *, before: int | None = None, limit: int = 100) -> tuple[AuditEntry, ...]:
        """At most `limit` entries of the audit log, newest first, from below the number `before` on."""
        ...


class AccessWriter(Protocol):
    """What can be changed; see `aggregator.repository`."""

    def add_token(self, token: TokenRecord) -> None:
        """Adds a token.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def revoke_token(self, token_id: str, at: float) -> None:
        """Revokes a token; one that is revoked keeps its first moment.

        Raises:
            NotFound: no such token.
        """
        ...

    def append_audit(self, entry: AuditEntry) -> None:
        """Appends an entry to the audit log, which nothing can change or erase; its number is ignored."""
        ...
