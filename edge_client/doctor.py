"""What `covey-edge doctor` finds, and what it advises. Pure: `edge_client.adapters.checks` looks.

A check either is fine, or says in one sentence what is wrong and in another what to do. A device lives with
what is only a warning.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "failed"]
LOW_DISK, LITTLE_DISK = 20 * 2**20, 200 * 2**20
"""Bytes: below the first a round cannot be stored for sure; below the second, models may not fit."""
LOW_MEMORY = 100
"""MiB that a first training takes beside what the client has at rest."""
SOON = 14 * 86_400
_MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        detail: what was seen.
        advice: what to do; empty when all is well.
    """

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""


def clock(now: int, start: int, end: int, newest: int, synchronised: bool | None) -> Finding:
    """Judges the clock by what cannot be later than now.

    Args:
        now: what the clock says, seconds since 1970.
        start: from when the device's certificate is valid.
        end: until when it is.
        newest: the latest time at which the client wrote to its state.
        synchronised: whether the system says that the network set the clock; None when it says neither.
    """
    said = day(now)
    set_it = "wait for the network time, or set the clock: timedatectl set-ntp true; a Pi has no clock chip"
    if now < start:
        detail = f"the clock says {said}, before this device's certificate is valid ({day(start)})"
        return Finding("clock", "failed", detail, set_it)
    if now < newest - 3600:
        detail = f"the clock says {said}, but this device was at work at {day(newest)}"
        return Finding("clock", "failed", detail, set_it)
    if now > end:
        return Finding(
            "clock",
            "failed",
            f"the clock says {said}, after this device's certificate ended ({day(end)})",
            "if the clock is right, enrol the device again: its ledger stays",
        )
    if synchronised is False:
        return Finding("clock", "warning", f"the clock says {said}, not set from the network yet", set_it)
    return Finding("clock", "ok", said)


def certificate(now: int, end: int) -> Finding:
    """Judges how long the device's certificate still holds."""
    if end - now < SOON:
        return Finding(
            "certificate",
            "warning" if now <= end else "failed",
            f"this device's certificate ends at {day(end)}",
            "let the client run and reach its broker, or enrol again: the ledger stays",
        )
    return Finding("certificate", "ok", f"holds until {day(end)}")


def disk(free: int, total: int) -> Finding:
    """Judges the space of the file system that holds the state."""
    said = f"{free / 2**20:.0f} MiB of {total / 2**20:.0f} are free"
    clear = "remove recordings or logs (journalctl --vacuum-size=50M), or limit them in edge.toml"
    if free < LOW_DISK:
        return Finding("disk", "failed", said, clear)
    return Finding("disk", "warning", said, clear) if free < LITTLE_DISK else Finding("disk", "ok", said)


def memory(free: int | None, controlled: bool | None) -> Finding:
    """Judges free memory, and whether a unit's MemoryMax holds.

    Args:
        free: MiB that a program could have without swapping; None is unknown.
        controlled: whether the kernel counts memory by control group; None where there are no such groups.
    """
    said = "unknown" if free is None else f"{free} MiB are free"
    if free is not None and free < LOW_MEMORY:
        return Finding("memory", "warning", said, "stop other programs, or add swap (zram-tools)")
    if controlled is False:
        return Finding(
            "memory",
            "warning",
            f"{said}; MemoryMax= in the unit does nothing, this kernel does not count memory by service",
            "add cgroup_enable=memory to /boot/firmware/cmdline.txt and restart, if the limit matters",
        )
    return Finding("memory", "ok", said)


def worst(findings: Sequence[Finding]) -> Verdict:
    """The verdict on the device."""
    found = {finding.verdict for finding in findings}
    return "failed" if "failed" in found else "warning" if "warning" in found else "ok"


def text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal: a line each, and what to do below it."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.verdict]:7}  {finding.check:{width}}  {finding.detail}")
        if finding.advice:
            lines.append(f"{'':7}  {'':{width}}  -> {finding.advice}")
    return "\n".join(lines)


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for a program."""
    return {"verdict": worst(findings), "findings": [asdict(finding) for finding in findings]}


def day(seconds: int) -> str:
    """A time in UTC, to the minute."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
