"""Whether anything changed in a state directory that predictions depend on, in some microseconds."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from edge_client.adapters.store import DATABASE

Revision = tuple[object, ...]
"""Equal to an earlier one as long as nothing changed in between."""


class StateWatch:
    """Looks at the database and the personal models of a device; for one thread at a time."""

    def __init__(self, state: Path) -> None:
        self._path, self._personal = state / DATABASE, state / "personal"
        self._connection: sqlite3.Connection | None = None
        self._inode: int | None = None

    def look(self) -> Revision:
        """The present revision. What cannot be read counts as changed, so that who reads it finds out why."""
        try:
            inode = self._path.stat().st_ino
            if self._connection is None or inode != self._inode:
                self.close()
                self._connection = sqlite3.connect(
                    f"{self._path.absolute().as_uri()}?mode=ro",
                    uri=True,
                    isolation_level=None,
                    timeout=2.0,
                    check_same_thread=False,
                )
                self._inode = inode
                # So that a revision of this connection is none of the one before.
                self._opened = object()
            # Changes with every commit of another connection (sqlite.org/pragma.html#pragma_data_version).
            version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        except (OSError, sqlite3.Error):
            self.close()
            return (object(),)
        return (self._opened, version, *self._files())

    def close(self) -> None:
        """Lets go of the database."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def __del__(self) -> None:
        """A predictor that is forgotten leaves no file open."""
        self.close()

    def _files(self) -> list[tuple[str, int, int]]:
        # Each is replaced as a whole, and so by another inode.
        try:
            with os.scandir(self._personal) as found:
                return sorted((e.name, e.inode(), e.stat().st_mtime_ns) for e in found)
        except OSError:
            return []
