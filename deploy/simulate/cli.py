"""The command `covey simulate`, found by the `covey` program through its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from aggregator.cli_options import (
    AdaptiveClip,
    Bits,
    ClipNorm,
    Delta,
    LearningRate,
    LocalEpochs,
    NoiseMultiplier,
    Rounds,
)
from aggregator.optimizers import Server
from deploy.simulate.options import (
    Engine,
    PlanFile,
    SimulationError,
    SimulationOptions,
    read_plan,
)
from protocol.dp.parameters import PrivacyMode


def simulate(
    engine: Annotated[
        Engine, typer.Option(help="Covey's own training and encoding, or TensorFlow Federated.")
    ] = Engine.LOCAL,
    plan: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON of the figures below, or what `covey privacy plan --json` printed.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="watch, digits, or FILE.py:NAME of a model project.", show_default="as --data"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="watch, digits, or a directory of one NPZ a device.", show_default="as --model"),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Simulated devices; beyond the people in the data, a person's examples are dealt out.",
            show_default="one a person",
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=1, help="People, or devices, that are tested on and train nothing.")
    ] = 1,
    rounds: Rounds = None,
    cohort: Annotated[
        int | None, typer.Option(min=2, help="Devices in a round.", show_default="10, or all")
    ] = None,
    min_survivors: Annotated[
        int | None,
        typer.Option(
            min=2, help="Updates that the noise is sized for.", show_default="above 2/3 of the cohort"
        ),
    ] = None,
    local_epochs: LocalEpochs = None,
    lr: LearningRate = None,
    server_optimizer: Annotated[
        Server | None, typer.Option(help="How the mean update moves the model.", show_default="fedavg")
    ] = None,
    server_lr: Annotated[
        float | None, typer.Option(help="Its learning rate.", show_default="its own")
    ] = None,
    privacy: Annotated[
        PrivacyMode | None,
        typer.Option(help="Who adds noise: nobody, the aggregator, every device.", show_default="none"),
    ] = None,
    noise_multiplier: NoiseMultiplier = None,
    clip_norm: ClipNorm = None,
    adaptive_clip: AdaptiveClip = None,
    bits: Bits = None,
    delta: Delta = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of devices, cohorts, orders and noise.", show_default="1")
    ] = None,
    report: Annotated[
        Path, typer.Option(file_okay=False, metavar="DIR", help="Folder for index.html and result.json.")
    ] = Path("simulation-report"),
) -> None:
    """Runs a campaign on simulated devices, and writes the report that a real one has, labelled simulated.

    Options go before what a --plan says. TensorFlow Federated runs in an environment of its own, which
    `make setup-parity` makes; COVEY_TFF_PYTHON names its interpreter where it is elsewhere.

    Examples:

      covey simulate --model watch

      covey simulate --engine tff --model digits --rounds 5 --privacy central --noise-multiplier 0.5

      covey privacy plan --population 1000 --cohort 100 --rounds 20 --epsilon 8 --json > plan.json

      covey simulate --plan plan.json --model digits
    """
    try:
        figures = (PlanFile() if plan is None else read_plan(plan)).updated(
            model=model,
            population=devices,
            rounds=rounds,
            cohort=cohort,
            min_survivors=min_survivors,
            local_epochs=local_epochs,
            learning_rate=lr,
            server_optimizer=server_optimizer,
            server_learning_rate=server_lr,
            mode=privacy,
            noise_multiplier=noise_multiplier,
            clip_norm=clip_norm,
            adaptive_quantile=adaptive_clip,
            bits=bits,
            delta=delta,
            seed=seed,
        )
        # Imported here: `covey --help` must not load Matplotlib, nor fail where the demo is not installed.
        from deploy.simulate.run import run_simulation

        run_simulation(SimulationOptions(engine, figures, data, held_out, report))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except SimulationError as error:
        typer.echo(f"simulate: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("stopped; nothing is left running", err=True)
        raise typer.Exit(130) from None
