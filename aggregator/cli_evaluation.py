"""The command `covey evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aggregator import cli_output as output
from aggregator.cli_options import (
    AskedOnce,
    Form,
    Json,
    Output,
    OverSelect,
    Where,
    asked_once,
    idle,
    options_of,
    service,
)
from aggregator.cli_waiting import nothing_yet, wait
from aggregator.evaluations import EvaluationRequest
from aggregator.rounds.evaluation import VersionEvaluation

_console = Console(highlight=False)


@options_of(asked_once, "asked")
def evaluate(
    *,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    state: Where = None,
    version: Annotated[int | None, typer.Option(min=1, help="Its version.", show_default="newest")] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Ask only devices that never trained the model; else they go first."),
    ] = False,
    over_select: OverSelect = 1.0,
    asked: AskedOnce,
    past: Annotated[bool, typer.Option("--past", help="Ask nobody: show the evaluations so far.")] = False,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Asks devices how a version does on their own examples, through a secure sum; nothing is trained.

    Examples:

      covey evaluate watch --version 12 --cohort 20

      covey evaluate watch --past
    """
    as_json = json or form is Form.JSON
    with service(state) as client:
        if past:
            _show(client.evaluations(model, version), model, json=as_json)
            return
        request = EvaluationRequest(
            model=model, version=version, held_out=held_out, over_select=over_select, **asked
        )
        campaign = client.start_evaluation(request)
        if idle(state):
            output.hint(
                "no aggregator is running: the evaluation begins when you start `covey aggregator run`; "
                f"see it with `covey evaluate {model} --past`"
            )
            return
        wait(client, campaign.campaign, f"evaluation {campaign.campaign[:8]}")
        campaign, rounds = client.campaign(campaign.campaign), client.rounds(campaign.campaign)
        round_ = rounds[-1] if rounds else None
        if round_ is None or round_.report.evaluation is None:
            nothing_yet(campaign, round_, "the evaluation")
            return
        if as_json:
            output.dump(round_.report.evaluation)
        else:
            _show([round_.report.evaluation], model, json=False)


def _show(found: Sequence[VersionEvaluation], model: str, *, json: bool) -> None:
    if json:
        output.dump(found)
        return
    if not found:
        output.line(f"no evaluations yet: ask for one with `covey evaluate {model}`")
        return
    table = Table("version", "loss", "accuracy", "examples", "devices", "held out", "epsilon", "at", box=None)
    for each in found:
        table.add_row(
            f"{each.model} {each.version}",
            *(_figure(each, name) for name in ("loss", "accuracy", "examples")),
            str(each.participants),
            str(each.held_out),
            "" if each.epsilon is None else f"{each.epsilon:.2f}",
            output.moment(each.at),
        )
    _console.print(table)


def _figure(evaluation: VersionEvaluation, name: str) -> str:
    if name not in evaluation.metrics:
        return ""
    figure = evaluation.metrics[name]
    if figure.standard_error < 0.0005:
        return f"{figure.mean:.3f}"
    return f"{figure.mean:.3g} ± {figure.standard_error:.2g}"
