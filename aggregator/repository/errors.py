"""What can go wrong with the storage, or with what was asked of it."""

from __future__ import annotations


class RepositoryError(Exception):
    """Something is wrong with the storage, or with what was asked of it."""


class UnknownSchema(RepositoryError):
    """The database was made by a newer Covey, or by something else; nothing was changed."""


class OutdatedSchema(RepositoryError):
    """The database was made by an older Covey, or has no tables yet: it must be migrated first."""


class StorageUnavailable(RepositoryError):
    """The database cannot be read or written now: disk full, read-only, locked, gone. Nothing was changed."""


class Contended(StorageUnavailable):
    """Somebody else was in the way for too long; the same transaction may succeed when it is made again."""


class OutcomeUnknown(StorageUnavailable):
    """The database was lost while it committed: only another look at it can tell whether it has."""


class Superseded(RepositoryError):
    """Another service has claimed the database: this one must end."""


class Unstorable(ValueError):
    """A value that this database cannot hold, such as a zero byte in a text; nothing was changed."""


class Conflict(RepositoryError):
    """A record with this key is already there."""


class NotFound(RepositoryError):
    """There is no such record."""
