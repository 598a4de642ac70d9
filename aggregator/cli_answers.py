"""How answers to queries look: figures with what is uncertain about them, histograms as bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from aggregator.rounds.answer import Answer, HistogramAnswer, NumberAnswer, QuantileAnswer
from aggregator.web.schemas import Campaign, Round
from models.assignment import described
from protocol.plan import QuantileQuestion

_console = Console(highlight=False)
BAR_WIDTH = 40


def answer(round_: Round, found: Answer) -> None:
    """Prints an answer, who gave it, and what it cost."""
    task, figures = found.task, found.figures
    bounds = f"values clipped to [{task.low:g}, {task.high:g}]"
    if isinstance(figures, NumberAnswer):
        _console.print(f"{described(task)}  [bold]{_number(figures.estimate, figures.standard_error)}[/bold]")
        _row("interval", f"{figures.low:.6g} to {figures.high:.6g} (95 %, of noise and rounding)")
        _row("standard error", f"{figures.standard_error:.3g}; {bounds}")
    elif isinstance(figures, QuantileAnswer):
        q = task.question.q if isinstance(task.question, QuantileQuestion) else 0.0
        estimate = _number(figures.estimate, figures.resolution)
        _console.print(f"{described(task)} at {q:g}  [bold]{estimate}[/bold]")
        _row("interval", f"{figures.low:.6g} to {figures.high:.6g} (95 %, of noise and resolution)")
        _row("resolution", f"{figures.resolution:.3g}; {bounds}")
    elif isinstance(figures, HistogramAnswer):
        _console.print(described(task))
        _console.print(_bars(figures))
        _row("standard error", f"{figures.standard_error:.3g} of each count; {bounds}")
    else:
        assert_never(figures)
    _row("participants", f"{found.participants} of {len(round_.invited)} invited{_declined(round_)}")
    _row("epsilon", _cost(found, round_))


def listing(campaigns: Sequence[Campaign], rounds: Sequence[Round]) -> None:
    """Prints queries, one a line."""
    of = {each.campaign: each for each in rounds}
    table = Table("query", "asked", "status", "answer", "participants", "epsilon", box=None)
    for campaign in campaigns:
        round_ = of.get(campaign.campaign)
        found = None if round_ is None else round_.report.answer
        asked = "?" if campaign.query is None else described(campaign.query)
        if round_ is not None and round_.status == "aborted":
            status = f"[red]{round_.code}[/red]"
        else:
            status = campaign.status
        table.add_row(
            campaign.campaign[:8],
            asked,
            status,
            "" if found is None else _short(found),
            "" if found is None else str(found.participants),
            "" if found is None or found.epsilon is None else f"{found.epsilon:.2f}",
        )
    _console.print(table)


def _bars(figures: HistogramAnswer) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(min_width=BAR_WIDTH)
    table.add_column(justify="right")
    largest = max(*figures.counts, 1.0)
    for low, high, count in zip(figures.edges, figures.edges[1:], figures.counts, strict=False):
        # Noise makes counts negative; a bar cannot be.
        bar = Bar(largest, 0, max(count, 0.0), width=BAR_WIDTH, color="cyan")
        table.add_row(f"{low:.4g} to {high:.4g}", bar, f"{count:.1f}")
    return table


def _number(value: float, error: float) -> str:
    """As many digits as the error leaves."""
    return f"{value:.{_decimals(error)}f}"


def _decimals(error: float) -> int:
    decimals = 0
    while decimals < 9 and error < 10.0 ** (1 - decimals):
        decimals += 1
    return decimals


def _short(found: Answer) -> str:
    figures = found.figures
    if isinstance(figures, NumberAnswer):
        return f"{_number(figures.estimate, figures.standard_error)} ± {figures.standard_error:.2g}"
    if isinstance(figures, QuantileAnswer):
        return f"{_number(figures.estimate, figures.resolution)} ({figures.low:.4g} to {figures.high:.4g})"
    return f"{len(figures.counts)} bins"


def _declined(round_: Round) -> str:
    codes = Counter(why.partition(":")[0] for why in round_.report.declined.values())
    said = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
    return f"; declined: {said}" if said else ""


def _cost(found: Answer, round_: Round) -> str:
    if found.epsilon is None:
        return "none is promised: no noise was added"
    all_in_all = round_.report.epsilon
    fleet = "" if all_in_all is None else f"; {all_in_all:.3g} by everything the fleet was asked so far"
    return f"{found.epsilon:.3g} by this query, at delta {round_.report.delta:g}{fleet}"


def _row(name: str, text: str) -> None:
    _console.print(f"  {name:15}{text}", soft_wrap=True, markup=False)
