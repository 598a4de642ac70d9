"""The real service, with a trap in its storage: at one boundary of the first round, a victim gets SIGKILL.

    python benchmarks/faults_service.py TRAP aggregator run --state DIR --broker URL

TRAP is the JSON of `Trap`. Everything else is `covey`, which knows nothing of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import aggregator.opened_state
from aggregator.adapters.sql import SqlRepository
from aggregator.records import LogEntry, Round, RoundEnding
from aggregator.repository import Writer
from aggregator.rounds.report import PHASES
from tests.databases import PostgresProcess

BOUNDARIES = ("begin", "store an input", *(f"close {phase}" for phase in PHASES), "end")
"""Transactions that move a round on: it begins, takes its first input, closes its phases, and ends."""
SIDES = ("before its commit", "after its commit")
"""Before: nothing of it is durable. After: all of it is, and nothing that follows from it has been sent."""


@dataclass(frozen=True)
class Trap:
    """When to strike, and whom.

    Attributes:
        boundary: one of `BOUNDARIES`.
        side: one of `SIDES`.
        mark: file that appears when it has struck.
        broker: process id, when the broker is the victim.
        postgres: programs and directory of the server, when that is the victim; else the service itself is.
    """

    boundary: str
    side: str
    mark: str
    broker: int = 0
    postgres: tuple[str, str] | None = None

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    def strike(self) -> None:
        """Kills the victim, once."""
        if Path(self.mark).exists():
            return
        Path(self.mark).touch()
        if self.broker:
            os.kill(self.broker, signal.SIGKILL)
        elif self.postgres:
            PostgresProcess(*map(Path, self.postgres)).kill()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


class _Watch:
    """A writer that notes which boundary its transaction crosses."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.crossed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def begin_round(self, round_: Round) -> None:
        self._writer.begin_round(round_)
        self.crossed.add("begin")

    def append_log(self, round_id: str, entry: LogEntry) -> None:
        self._writer.append_log(round_id, entry)
        if entry.kind == "closed":
            closed = sum(known.kind == "closed" for known in self._writer.log(round_id))
            self.crossed.add(f"close {PHASES[closed - 1]}")

    def note_input(self, round_id: str, device_id: str, sha256: str) -> None:
        self._writer.note_input(round_id, device_id, sha256)
        self.crossed.add("store an input")

    def end_round(self, ending: RoundEnding) -> None:
        self._writer.end_round(ending)
        self.crossed.add("end")


def set_trap(trap: Trap) -> None:
    """Puts the trap into every repository that this process opens."""

    class Trapped(SqlRepository):
        @contextmanager
        def write(self) -> Iterator[Writer]:
            with super().write() as writer:
                watch = _Watch(writer)
                yield cast(Writer, watch)
                hit = trap.boundary in watch.crossed
                if hit and trap.side == SIDES[0]:
                    trap.strike()
            if hit and trap.side == SIDES[1]:
                trap.strike()

    aggregator.opened_state.SqlRepository = Trapped  # type: ignore[misc]


if __name__ == "__main__":
    set_trap(Trap(**json.loads(sys.argv.pop(1))))
    from aggregator.cli import main

    main()
