"""One service for one PostgreSQL database: refused early by a lock, and never wrong because of a token.

The lock belongs to a connection, so it ends with the service, however that ends. It also ends when the server
restarts; another service may then come first. What decides is the token: whoever claims the database writes
its own, and a service that finds another one there, in its own write transaction, has been superseded.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, delete, event, insert, select

from aggregator.adapters.sql_schema import meta
from aggregator.repository import Superseded

SERVICE_LOCK = 0x636F766579_02
_KEY = "service"
_REFUSAL = "another aggregator runs on this database, perhaps on another machine: stop it first"


class Claim:
    """The claim of one service."""

    def __init__(self, engine: Engine) -> None:
        """Prepares a claim on the database of `engine`."""
        self._engine = engine
        self._token = secrets.token_hex(16)
        self._holder: Any = None
        self._doubtful = True
        event.listen(engine, "connect", self._note_connection)

    def _note_connection(self, *_: object) -> None:
        # A new connection may mean that the server was restarted, and the lock is gone with it.
        self._doubtful = True

    def take(self, connection: Connection) -> None:
        """Claims the database in a write transaction.

        Raises:
            Superseded: another service has.
        """
        self._lock()
        connection.execute(delete(meta).where(meta.c.key == _KEY))
        connection.execute(insert(meta).values(key=_KEY, value=self._token))

    def check(self, connection: Connection) -> None:
        """Makes sure, in a write transaction, that nobody else has claimed the database since.

        Raises:
            Superseded: somebody has.
        """
        if connection.execute(select(meta.c.value).where(meta.c.key == _KEY)).scalar() != self._token:
            raise Superseded(_REFUSAL)
        if self._doubtful:
            self._lock()

    def _lock(self) -> None:
        if self._holder is not None:
            if _answers(self._holder):
                self._doubtful = False
                return
            self._unlock()
        pooled = self._engine.raw_connection()
        holder: Any = pooled.driver_connection
        # Beside the pool: it stays open as long as the claim.
        pooled.detach()
        holder.rollback()
        holder.autocommit = True
        if not holder.execute("SELECT pg_try_advisory_lock(%s)", (SERVICE_LOCK,)).fetchone()[0]:
            holder.close()
            raise Superseded(_REFUSAL)
        self._holder, self._doubtful = holder, False

    def _unlock(self) -> None:
        if self._holder is not None:
            # Closing alone returns before the server has let go.
            with suppress(Exception):  # of the driver: a session that is lost holds nothing
                self._holder.execute("SELECT pg_advisory_unlock(%s)", (SERVICE_LOCK,))
            self._holder.close()
            self._holder = None

    def release(self) -> None:
        """Lets others claim the database."""
        event.remove(self._engine, "connect", self._note_connection)
        self._unlock()


def _answers(holder: Any) -> bool:
    try:
        holder.execute("SELECT 1")
    except Exception:  # of the driver, which is imported where it is installed
        return False
    return True
