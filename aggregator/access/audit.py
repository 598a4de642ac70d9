"""The record of what operators did: one entry an action, written in the transaction of its effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from aggregator.clock import Clock
from aggregator.records import AuditEntry
from aggregator.repository import Reader, Repository, Writer


@dataclass
class AuditedRepository:
    """A repository in the hands of one principal: every write transaction carries its entry.

    So there is no effect without a trace, and no trace of an effect that was rolled back.
    """

    inner: Repository
    entry: AuditEntry
    clock: Clock

    def read(self) -> AbstractContextManager[Reader]:
        """See `Repository`."""
        return self.inner.read()

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Opens the write transaction; the entry is its last change."""
        with self.inner.write() as writer:
            yield writer
            writer.append_audit(replace(self.entry, at=self.clock.moment().unix))

    def refused(self, outcome: str) -> None:
        """Records that the action was refused.

        Args:
            outcome: code of the refusal.
        """
        with self.inner.write() as writer:
            writer.append_audit(replace(self.entry, at=self.clock.moment().unix, outcome=outcome))

    def close(self) -> None:
        """Does nothing: the repository is its owner's."""
