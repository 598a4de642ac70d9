"""The command `covey evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, OverSelect, Where, WhichDevices, idle, service
from aggregator.cli_waiting import nothing_yet, wait
from aggregator.evaluations import EvaluationRequest
from aggregator.rounds.evaluation import VersionEvaluation
from protocol.dp.parameters import PrivacyMode

_console = Console(highlight=False)


def evaluate(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    state: Where = None,
    version: Annotated[int | None, typer.Option(min=1, help="Its version.", show_default="newest")] = None,
    cohort: Annotated[int, typer.Option(min=2, help="Devices in a full cohort.")] = 10,
    minimum: Annotated[
        int | None,
        typer.Option(min=2, help="Check-ins that the round needs.", show_default="above 2/3 of the cohort"),
    ] = None,
    min_survivors: Annotated[
        int | None,
        typer.Option(min=2, help="Answers that a sum needs.", show_default="as many as --minimum"),
    ] = None,
    privacy: Annotated[
        PrivacyMode, typer.Option(help="Who adds noise: nobody, the aggregator, every device.")
    ] = PrivacyMode.DISTRIBUTED,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="Noise over sensitivity.", show_default="1 where there is noise"),
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    max_epsilon: Annotated[
        float | None,
        typer.Option(help="Do not ask if it takes the fleet beyond it.", show_default="no limit"),
    ] = None,
    gather: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for a full cohort.")] = 3.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the cohort.", show_default="random")] = None,
    where: WhichDevices = "",
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Ask only devices that never trained the model; else they go first."),
    ] = False,
    over_select: OverSelect = 1.0,
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
            model=model,
            version=version,
            cohort=cohort,
            minimum=minimum,
            min_survivors=min_survivors,
            privacy=privacy,
            noise_multiplier=noise_multiplier,
            delta=delta,
            gather_seconds=gather,
            epsilon_limit=max_epsilon,
            where=where,
            held_out=held_out,
            over_select=over_select,
            seed=seed,
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
