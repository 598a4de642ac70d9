"""Keeps the broker's access as the database has it: at each connection, and whenever a device comes or goes.

It belongs to the main loop and holds nothing that must survive: after each connection it asks the broker what
it has, and tells it what is missing or too much. Commands are answered one batch at a time; what is not
answered, or answered by an error, is looked into by asking again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aggregator.fleet import access
from aggregator.fleet.access import Command
from aggregator.work import Outgoing

logger = logging.getLogger(__name__)

PAGE = 100
"""Clients or roles in one answer, commands in one request: some tens of kilobytes."""
ANSWER_SECONDS = 10.0
AGAIN_SECONDS = 30.0
"""How long after a failure the broker is asked again."""
FILE_SECONDS = 10.0
"""How long new devices may wait for their place in the file; the running broker knows them at once."""

WriteAccess = Callable[[bytes], None]


@dataclass
class _Reading:
    """The broker is asked what it has, page by page."""

    clients: list[dict[str, Any]] = field(default_factory=list)
    roles: list[dict[str, Any]] = field(default_factory=list)
    defaults: list[dict[str, Any]] = field(default_factory=list)
    totals: tuple[int, int] = (0, 0)


@dataclass
class _Telling:
    """The broker is told; the first batch of these commands is under way."""

    commands: Sequence[Command]
    devices: frozenset[str]
    """Who is known to it once all of them are done."""


@dataclass(frozen=True)
class _Settled:
    """The broker has what it should have had for these devices."""

    devices: frozenset[str]


@dataclass(frozen=True)
class _Waiting:
    """Nothing is under way until `until`, on the monotonic clock."""

    until: float


class Doorkeeper:
    """See the module.

    Attributes:
        trouble: why the broker's access cannot be kept; empty when it can.
    """

    def __init__(self, write_file: WriteAccess | None = None) -> None:
        """Prepares it for a broker that is not connected.

        Args:
            write_file: replaces the file that the broker is started with; None where it is kept elsewhere.
        """
        self.trouble = ""
        self._write_file = write_file
        self._written: frozenset[str] | None = None
        self._write_at, self._writable = float("-inf"), True
        self._phase: _Reading | _Telling | _Settled | _Waiting | None = None
        self._leaving: frozenset[str] = frozenset()
        self._sequence = 0
        self._deadline = 0.0
        self._failures = 0

    @property
    def settled(self) -> bool:
        """Whether the broker is known to have what it was last to have."""
        return isinstance(self._phase, _Settled)

    def connected(self) -> None:
        """Takes in that the broker is there: what it has is to be found out."""
        self._phase, self._failures = _Waiting(float("-inf")), 0

    def disconnected(self) -> None:
        """Takes in that the broker is gone."""
        self._phase = None

    def send_away(self, devices: frozenset[str]) -> None:
        """Has the connections of these devices ended once; they may come back."""
        self._leaving |= devices

    def tick(self, devices: frozenset[str], clock: float) -> list[Outgoing]:
        """Does what is due; returns what is to be published.

        Args:
            devices: ids of those that may connect now.
            clock: monotonic seconds.
        """
        self._keep_file(devices, clock)
        match self._phase:
            case None:
                return []
            case _Waiting(until):
                return [] if clock < until else self._read(clock)
            case _Settled(known):
                leaving, self._leaving = self._leaving & known & devices, frozenset()
                if leaving:
                    return self._tell(access.send_away(leaving), known, clock)
                if known == devices:
                    return []
                change = access.reconcile(access.wanted(known - devices), access.wanted(devices - known))
                return self._tell(change, devices, clock)
            case _Reading() | _Telling():
                if clock >= self._deadline:
                    self._failed("its dynamic security plugin does not answer", clock)
                return []

    def heard(self, payload: bytes, devices: frozenset[str], clock: float) -> list[Outgoing]:
        """Takes in an answer of the broker; returns what is to be published."""
        phase = self._phase
        if not isinstance(phase, _Reading | _Telling):
            return []
        try:
            answers = json.loads(payload)["responses"]
            if any(answer.get("correlationData") != str(self._sequence) for answer in answers):
                return []  # to somebody else, or to what was given up
            errors = [f"{answer['command']}: {answer['error']}" for answer in answers if "error" in answer]
            if errors:
                self._failed(f"it refused {errors[0]}", clock)
                return []
            if isinstance(phase, _Telling):
                return self._tell(phase.commands[PAGE:], phase.devices, clock)
            return self._take(phase, answers, devices, clock)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._failed(f"its answer cannot be understood: {type(error).__name__}", clock)
            return []

    # --- asking

    def _read(self, clock: float) -> list[Outgoing]:
        self._phase = _Reading()
        return self._ask(({"command": "getDefaultACLAccess"}, *_pages(0, 0)), clock)

    def _take(
        self, phase: _Reading, answers: Sequence[dict[str, Any]], devices: frozenset[str], clock: float
    ) -> list[Outgoing]:
        clients, roles = phase.totals
        for answer in answers:
            data = answer["data"]
            match answer["command"]:
                case "listClients":
                    phase.clients += data["clients"]
                    clients = int(data["totalCount"])
                case "listRoles":
                    phase.roles += data["roles"]
                    roles = int(data["totalCount"])
                case "getDefaultACLAccess":
                    phase.defaults = data["acls"]
        phase.totals = clients, roles
        if len(phase.clients) < clients or len(phase.roles) < roles:
            return self._ask(_pages(len(phase.clients), len(phase.roles)), clock)
        found = access.found(phase.clients, phase.roles, phase.defaults)
        return self._tell(access.reconcile(found, access.wanted(devices)), devices, clock)

    def _tell(self, commands: Sequence[Command], devices: frozenset[str], clock: float) -> list[Outgoing]:
        if not commands:
            if self._failures or not isinstance(self._phase, _Settled):
                logger.info("the broker lets in %d devices", len(devices))
            self._phase, self._failures, self.trouble = _Settled(devices), 0, ""
            return []
        self._phase = _Telling(commands, devices)
        return self._ask(commands[:PAGE], clock)

    def _ask(self, commands: Sequence[Command], clock: float) -> list[Outgoing]:
        self._sequence += 1
        self._deadline = clock + ANSWER_SECONDS
        marked = [{**command, "correlationData": str(self._sequence)} for command in commands]
        return [Outgoing(access.CONTROL, json.dumps({"commands": marked}).encode())]

    def _failed(self, what: str, clock: float) -> None:
        # Once without waiting: somebody else may have changed something meanwhile.
        self._failures += 1
        self._phase = _Waiting(clock if self._failures == 1 else clock + AGAIN_SECONDS)
        if self._failures > 1:
            self.trouble = (
                f"the broker's access cannot be kept: {what}; run `covey aggregator broker`, and start the "
                "broker by the script that it writes"
            )
        logger.warning("the broker's access cannot be kept: %s", what)

    # --- the file

    def _keep_file(self, devices: frozenset[str], clock: float) -> None:
        if self._write_file is None or devices == self._written:
            return
        # Who is gone must not come back by a restart of the broker; who is new can wait.
        urgent = self._written is None or not self._written <= devices
        if clock < self._write_at and not (urgent and self._writable):
            return
        self._write_at = clock + FILE_SECONDS
        try:
            self._write_file(access.document(access.wanted(devices)))
        except OSError as error:
            logger.error("the broker's access cannot be written: %s", error)
            self.trouble = f"the broker's access cannot be written: {error}"
            self._writable = False
            return
        self._written, self._writable = devices, True


def _pages(clients: int, roles: int) -> tuple[Command, ...]:
    """Asks for a page of each, from these offsets on."""
    return tuple(
        {"command": command, "verbose": True, "count": PAGE, "offset": offset}
        for command, offset in (("listClients", clients), ("listRoles", roles))
    )
