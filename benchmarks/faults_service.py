"""The real service, with a trap in its storage: at one boundary of what it does, a victim gets SIGKILL.

    python benchmarks/faults_service.py TRAP aggregator run --state DIR --broker URL

TRAP is the JSON of `Trap`. Everything else is `covey`, which knows nothing of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from aggregator.adapters.mqtt import MqttTransport
from aggregator.adapters.sql import SqlRepository
from aggregator.buffering import Buffers
from aggregator.records import Assigned, Campaign, LogEntry, Rollout, Round, RoundEnding, Version
from aggregator.repository import Writer
from aggregator.rollout.machine import Progress, Running
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.report import PHASES
from aggregator.work import Work
from protocol.messages import UpdateReady
from tests.databases import PostgresProcess

BOUNDARIES = ("begin", "store an input", *(f"close {phase}" for phase in PHASES), "end")
"""Transactions that move a round on: it begins, takes its first input, closes its phases, and ends."""
BUFFER_BOUNDARIES = ("order", "admit an update", "fill", *BOUNDARIES, "order anew")
"""Those of a buffer: devices are ordered to train, the first update waits, the last one does; it is sealed
and collected as a round is; and who was in it is ordered to train from the version that came of it."""
ROLLOUT_BOUNDARIES = (
    "start",
    "assign",
    "publish",
    "settle",
    "enter a wave",
    "complete",
    "fail a gate",
    "halt",
    "roll back",
)
"""Those of a rollout: it starts, devices are assigned the version and told, a wave has settled, the next one
begins as its gates hold, it completes, or goes back; and an operator halts it, or takes it back."""
SIDES = ("before its commit", "after its commit")
"""Before: nothing of it is durable. After: all of it is, and nothing that follows from it has been sent."""


@dataclass(frozen=True)
class Trap:
    """When to strike, and whom.

    Attributes:
        boundary: one of `BOUNDARIES`, `BUFFER_BOUNDARIES` or `ROLLOUT_BOUNDARIES`.
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


class _Now(threading.local):
    """What the transaction of this thread crosses."""

    watch: _Watch | None = None

    def cross(self, boundary: str) -> None:
        if self.watch is not None:
            self.watch.crossed.add(boundary)


_now = _Now()


class _Watch:
    """A writer that notes which boundaries its transaction crosses."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.crossed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    # --- rounds

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

    # --- rollouts

    def add_rollout(self, rollout: Rollout) -> None:
        self._writer.add_rollout(rollout)
        self.crossed.add("start")

    def assign(self, assigned: Assigned) -> None:
        self._writer.assign(assigned)
        if assigned.device_id:
            self.crossed.add("assign")

    def update_rollout(self, rollout_id: str, status: str, progress: bytes) -> None:
        record = self._writer.rollout(rollout_id)
        assert record is not None
        before, after = Progress.from_bytes(record.progress).state, Progress.from_bytes(progress)
        self._writer.update_rollout(rollout_id, after.state.kind, progress)
        if isinstance(after.state, Running):
            assert isinstance(before, Running)
            if before.wave != after.state.wave:
                self.crossed.add("enter a wave")
            elif before.settled_at != after.state.settled_at:
                self.crossed.add("settle")
        else:
            by_itself = after.steps[-1].detail.startswith("the gate")
            names = {"completed": "complete", "halted": "halt", "rolled-back": "roll back"}
            self.crossed.add("fail a gate" if by_itself else names[after.state.kind])


def _watch_buffers() -> None:
    """Notes what happens to buffers, which is durable on the devices only, in the transaction around it."""
    ready, ask, sent = Buffers.update_ready, Buffers.ask, set[int]()

    def update_ready(self: Buffers, work: Work, device_id: str, message: UpdateReady) -> None:
        ready(self, work, device_id, message)
        _now.cross("admit an update")
        campaign = work.writer.campaign(message.order)
        assert campaign is not None
        size = CampaignSettings.from_bytes(campaign.settings).cohort.size
        if len(self._buffers[message.order].updates) == size:
            _now.cross("fill")

    def asked(
        self: Buffers,
        work: Work,
        campaign: Campaign,
        settings: CampaignSettings,
        version: Version,
        idle: frozenset[str],
    ) -> None:
        before = len(work.outbox)
        ask(self, work, campaign, settings, version, idle)
        if len(work.outbox) > before:
            sent.add(version.version)
            _now.cross("order anew" if len(sent) > 1 else "order")

    Buffers.update_ready, Buffers.ask = update_ready, asked  # type: ignore[method-assign,assignment]


def _watch_announcements(trap: Trap) -> None:
    """Strikes around the first message that tells a device to have a version of its own."""
    publish = MqttTransport.publish

    def published(self: MqttTransport, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        hit = trap.boundary == "publish" and retain and "/down/model-" in topic
        if hit and trap.side == SIDES[0]:
            trap.strike()
        done = publish(self, topic, payload, retain=retain)
        if hit:
            trap.strike()
        return done

    MqttTransport.publish = published  # type: ignore[method-assign]


def set_trap(trap: Trap) -> None:
    """Puts the trap into every repository that this process opens."""

    open_writer = SqlRepository.write

    @contextmanager
    def write(self: SqlRepository) -> Iterator[Writer]:
        with open_writer(self) as writer:
            _now.watch = watch = _Watch(writer)
            try:
                yield cast(Writer, watch)
            finally:
                _now.watch = None
            hit = trap.boundary in watch.crossed
            if hit and trap.side == SIDES[0]:
                trap.strike()
        if hit and trap.side == SIDES[1]:
            trap.strike()

    SqlRepository.write = write  # type: ignore[method-assign]
    _watch_buffers()
    _watch_announcements(trap)


if __name__ == "__main__":
    set_trap(Trap(**json.loads(sys.argv.pop(1))))
    from aggregator.cli import main

    main()
