"""What the commands print: tables for people, JSON for machines, progress while something runs."""

from __future__ import annotations

import datetime as dt
import json as json_module
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pydantic import BaseModel
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from aggregator.rounds.report import RoundReport
from aggregator.web.schemas import AuditEntry, Campaign, Device, Round, Token, Version
from models.assignment import described
from protocol.client_release import CLIENT, numbered

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


def line(text: str) -> None:
    """Prints a line."""
    _console.print(escape(text), soft_wrap=True)


def hint(text: str) -> None:
    """Prints advice, away from the output."""
    _errors.print(escape(text), style="yellow", soft_wrap=True)


def fail(text: str) -> None:
    """Prints an error."""
    _errors.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table."""
    _console.print(table)


def dump_value(value: object) -> None:
    """Prints what JSON can say, on one line."""
    _dump(value)


def _dump(value: object) -> None:
    sys.stdout.write(json_module.dumps(value) + "\n")
    sys.stdout.flush()


def moment(unix: float | None) -> str:
    return "never" if unix is None else dt.datetime.fromtimestamp(unix).strftime("%Y-%m-%d %H:%M:%S")


def dump(value: BaseModel | Sequence[BaseModel]) -> None:
    """Prints what the API said, as JSON on one line."""
    if isinstance(value, BaseModel):
        _dump(value.model_dump(mode="json"))
    else:
        _dump([each.model_dump(mode="json") for each in value])


def devices(items: Sequence[Device], *, json: bool) -> None:
    """Prints devices."""
    if json:
        dump(items)
        return
    if not items:
        line("no devices yet: `covey device token` makes tickets that let them in")
        return
    table = Table(
        "device",
        "status",
        "last seen",
        "client",
        "runtime",
        "models",
        "labels",
        "enrolled",
        "ticket",
        box=None,
    )
    for d in items:
        status = "[green]online[/green]" if d.online else "offline"
        if d.state != "active":
            status = f"[red]{d.state}[/red]"
        if d.excluded is not None:
            status += f" [red]excluded: {escape(d.excluded)}[/red]"
        models = ", ".join(
            # The client has a column of its own.
            [f"{name} {number}" for name, number in sorted(d.models.items()) if name != CLIENT]
            + [
                f"no {name}: {numbered(failed.version, name)} failed"
                for name, failed in sorted(d.failures.items())
                if name not in d.models or name == CLIENT
            ]
        )
        row = (d.device, status, moment(d.last_seen), escape(d.client_version), escape(d.runtime))
        came = (moment(d.enrolled_at), d.token or "")
        table.add_row(*row, escape(models), escape(" ".join(d.labels)), *came)
    _console.print(table)


def versions(items: Sequence[Version], *, json: bool) -> None:
    """Prints versions."""
    if json:
        dump(items)
        return
    if not items:
        line("no versions yet: publish one with `covey model publish DIR`")
        return
    table = Table("model", "version", "stage", "manifest", "published", "by", box=None)
    for v in items:
        origin = "operator" if v.round is None else f"round {v.round[:8]}"
        table.add_row(v.model, str(v.version), v.stage, v.manifest_sha256[:16], moment(v.created_at), origin)
    _console.print(table)


def tokens(items: Sequence[Token], *, json: bool) -> None:
    """Prints tokens, without what opens them."""
    if json:
        dump(items)
        return
    table = Table("token", "role", "label", "made", "by", "expires", box=None)
    for t in items:
        expires = "[red]revoked[/red]" if t.revoked_at is not None else moment(t.expires_at)
        table.add_row(t.token, t.role, escape(t.label), moment(t.created_at), escape(t.created_by), expires)
    _console.print(table)


def audit_log(items: Sequence[AuditEntry], *, json: bool) -> None:
    """Prints entries of the audit log."""
    if json:
        dump(items)
        return
    table = Table("when", "who", "role", "from", "action", "to", "outcome", box=None)
    for e in items:
        outcome = "[green]done[/green]" if e.outcome == "done" else f"[red]{escape(e.outcome)}[/red]"
        row = (e.who, e.role, e.address, e.action, e.target)
        table.add_row(moment(e.at), *(escape(text) for text in row), outcome)
    _console.print(table)


def campaigns(items: Sequence[Campaign], *, json: bool) -> None:
    """Prints campaigns."""
    if json:
        dump(items)
        return
    for c in items:
        turns = "buffers" if c.buffered else "rounds"
        progress = f"{c.started} of {c.rounds} {turns} of {_asked(c)} begun"
        line(f"campaign {c.campaign}: {c.status}, {progress}{f' ({c.note})' if c.note else ''}")
        if c.due_at is not None and c.status in ("waiting", "running"):
            line(f"  next round at {moment(c.due_at)} of this machine's clock, by {c.schedule}")


def status(items: Sequence[Campaign], rounds: Sequence[Round], *, json: bool) -> None:
    """Prints campaigns and rounds."""
    if json:
        found = {"campaigns": items, "rounds": rounds}
        _dump({name: [each.model_dump(mode="json") for each in group] for name, group in found.items()})
        return
    if not items:
        line("no rounds yet: ask for some with `covey round start --model NAME`")
        return
    campaigns(items, json=False)
    if rounds:
        _console.print(rounds_table(rounds))
        for each in rounds:
            if each.status == "aborted":
                line(f"{each.model or 'query'} {each.number} aborted: {each.detail}")


def rounds_table(rounds: Sequence[Round]) -> Table:
    """Rounds, one a line; it fits 80 columns.

    The column "answers" has a number a phase, from check-in to unmasking: how many devices gave the answer
    that they owed; yellow where some did not.
    """
    table = Table("round", "base", "status", "answers", "loss", "accuracy", "epsilon", "seconds", box=None)
    for r in rounds:
        report = r.report
        styles = (
            "cyan" if phase.ended is None else "yellow" if phase.dropped else "green"
            for phase in report.phases
        )
        answers = [f"[{s}]{p.answered}[/{s}]" for s, p in zip(styles, report.phases, strict=True)]
        phase = report.phases[-1] if report.phases else None
        outcome = {
            "running": "selected" if phase is None else f"{phase.phase} {phase.answered}/{phase.expected}",
            "completed": f"[green]{_result(r)}{_staleness(report)}[/green]{_lost_parts(report)}",
            "aborted": f"[red]{escape(r.code)}[/red]",
        }[r.status]
        table.add_row(
            f"{r.model or 'query'} {r.number}",
            "" if r.base_version is None else str(r.base_version),
            outcome,
            " ".join(answers),
            _metric(report, "loss_after"),
            _metric(report, "accuracy"),
            "" if report.epsilon is None else f"{report.epsilon:.2f}",
            "" if r.ended_at is None else f"{r.ended_at - r.started_at:.1f}",
        )
    return table


def _asked(campaign: Campaign) -> str:
    if campaign.evaluates is not None:
        return f"evaluation of {campaign.model} v{campaign.evaluates}"
    if campaign.model is not None:
        return campaign.model
    return "a query" if campaign.query is None else described(campaign.query)


def _result(r: Round) -> str:
    if r.version is not None:
        return f"version {r.version}"
    return "an answer" if r.report.evaluation is None else "an evaluation"


def _staleness(report: RoundReport) -> str:
    """Of a buffer: how many versions behind its updates were."""
    ages = report.ages()
    if not ages:
        return ""
    mean = sum(behind * updates for behind, updates in ages.items()) / sum(ages.values())
    return f", {mean:.2g} behind, at most {max(ages)}"


def _lost_parts(report: RoundReport) -> str:
    """What a completed round has to say of sub-cohorts that failed."""
    lost = sum(bool(part.code) for part in report.subcohorts)
    return f" [yellow]without {lost} of {len(report.subcohorts)} sub-cohorts[/yellow]" if lost else ""


def _metric(report: RoundReport, name: str) -> str:
    if name not in report.metrics:
        return ""
    noise = report.metric_noise.get(name, 0.0)
    return f"{report.metrics[name]:.3f}" if noise < 0.001 else f"{report.metrics[name]:.2f}±{noise:.2f}"


class Watcher:
    """Shows a campaign again and again: a live table, plain lines into a pipe, or JSON lines."""

    def __init__(self, *, json: bool) -> None:
        """Prepares the watcher."""
        self._json = json
        self._live = (
            Live(console=_console, refresh_per_second=4) if _console.is_terminal and not json else None
        )
        self._seen: dict[str, Round] = {}
        self._lines: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Begins the display."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display; its last state stays."""
        if self._live is not None:
            self._live.stop()

    def show(self, campaign: Campaign, rounds: Sequence[Round]) -> None:
        """Shows what has changed."""
        if self._json:
            self._show_json(rounds)
        elif self._live is not None:
            table = rounds_table(rounds)
            table.title = (
                f"{_asked(campaign)}: {campaign.started} of {campaign.rounds} rounds, {campaign.status}"
            )
            table.caption = campaign.note or None
            self._live.update(table)
        else:
            self._show_lines(campaign, rounds)

    def _show_json(self, rounds: Sequence[Round]) -> None:
        for each in rounds:
            if self._seen.get(each.round) != each:
                self._seen[each.round] = each
                dump(each)

    def _show_lines(self, campaign: Campaign, rounds: Sequence[Round]) -> None:
        if campaign.note and self._lines.get("") != campaign.note:
            line(campaign.note)
        self._lines[""] = campaign.note
        for r in rounds:
            phase = r.report.phases[-1].phase if r.report.phases else "selected"
            what = {
                "running": phase,
                "completed": f"completed with {_result(r)}{_staleness(r.report)}",
                "aborted": f"aborted: {r.code}: {r.detail}",
            }[r.status]
            if self._lines.get(r.round) != what:
                self._lines[r.round] = what
                line(f"round {r.number} of {campaign.rounds}: {what}")
