"""The one storage interface of the aggregator, and what every implementation promises.

Everything happens in a transaction: `read()` sees one consistent state, `write()` is atomic, durable once the
block is left, and serialised against every other writer of the same database, in this process or another.
Leaving a `write()` block by an exception changes nothing. Durable means that a receipt may be sent: what was
written survives SIGKILL and a power cut.

Retries. Nobody retries inside an implementation: only the caller can make the whole transaction again. The
service does so for every `StorageUnavailable`: it loads its state again, and the broker brings again what was
not acknowledged. A command of an operator ends, and says why.

Implementations hold no rules. What they do refuse, because no caller can check it without a race: a second
record under the same key (`Conflict`), and changes to what is not there (`NotFound`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from aggregator.repository.access import AccessReader, AccessWriter
from aggregator.repository.errors import Conflict as Conflict
from aggregator.repository.errors import Contended as Contended
from aggregator.repository.errors import NotFound as NotFound
from aggregator.repository.errors import OutcomeUnknown as OutcomeUnknown
from aggregator.repository.errors import OutdatedSchema as OutdatedSchema
from aggregator.repository.errors import RepositoryError as RepositoryError
from aggregator.repository.errors import StorageUnavailable as StorageUnavailable
from aggregator.repository.errors import Superseded as Superseded
from aggregator.repository.errors import UnknownSchema as UnknownSchema
from aggregator.repository.errors import Unstorable as Unstorable
from aggregator.repository.fleet import FleetReader, FleetWriter
from aggregator.repository.rounds import RoundReader, RoundWriter
from aggregator.repository.versions import VersionReader, VersionWriter


class Reader(FleetReader, VersionReader, RoundReader, AccessReader, Protocol):
    """One consistent view of the database."""


class Writer(Reader, FleetWriter, VersionWriter, RoundWriter, AccessWriter, Protocol):
    """A transaction that may change things; it sees its own changes."""


class Repository(Protocol):
    """The database."""

    def read(self) -> AbstractContextManager[Reader]:
        """Opens a consistent view; it never waits for a writer."""
        ...

    def write(self) -> AbstractContextManager[Writer]:
        """Opens the one write transaction; waits for another writer, but not for ever.

        Raises:
            Contended: another writer, or somebody else at the database, took too long; nothing was changed.
            OutcomeUnknown: on leaving, the connection was lost.
            StorageUnavailable: on entry, inside or on leaving; nothing was changed.
            Superseded: this repository was claimed, and then by another service.
        """
        ...

    def close(self) -> None:
        """Releases connections and files."""
        ...
