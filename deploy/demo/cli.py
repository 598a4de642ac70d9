"""The command `covey demo`, found by the `covey` program through its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from deploy.demo.options import DemoError, DemoOptions, parse_folds
from deploy.demo.result import Dataset, PrivacyMode


def demo(
    devices: Annotated[
        int | None,
        typer.Option(min=3, metavar="N", help="Device processes.", show_default="one a person not held out"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="R", help="Rounds of training.", show_default="by the model's recipe"),
    ] = None,
    drop: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.49, metavar="P", help="Share of the devices killed in each of two rounds."
        ),
    ] = 0.2,
    privacy: Annotated[
        PrivacyMode, typer.Option(help="Who adds noise: nobody, the aggregator, every device.")
    ] = ("distributed"),
    dataset: Annotated[Dataset, typer.Option(help="People's watches, or handwritten digits.")] = "watch",
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Broker to use, mqtt://host:port or mqtts://host:port.",
            show_default="a private one on this machine",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="S", help="Same seed, same split and same accidents.")
    ] = 1,
    folds: Annotated[
        str,
        typer.Option(metavar="LIST", help="Which people to hold out in turn: numbers such as 0,3, or `all`."),
    ] = "0",
    test_people: Annotated[
        int, typer.Option(min=1, metavar="K", help="People held out of training in each fold.")
    ] = 1,
    report: Annotated[
        Path, typer.Option(file_okay=False, metavar="DIR", help="Folder for index.html and result.json.")
    ] = Path("demo-report"),
    open_: Annotated[
        bool, typer.Option("--open", help="Open the console in a browser, and keep it up until Ctrl-C.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep fleet and console up until Ctrl-C.")] = False,
) -> None:
    """Trains one model across device processes over real MQTT, on data that stays with each device.

    Examples:

      covey demo

      covey demo --open

      covey demo --devices 6 --rounds 5 --drop 0

      covey demo --folds all --privacy none --report everybody

      covey demo --dataset digits --broker mqtt://127.0.0.1:1883
    """
    try:
        options = DemoOptions(
            devices=devices,
            rounds=rounds,
            drop=drop,
            privacy=privacy,
            dataset=dataset,
            broker=broker,
            seed=seed,
            folds=parse_folds(folds),
            test_people=test_people,
            report=report,
            open=open_,
            keep=keep or open_,
        )
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise typer.BadParameter(
            f"--{first['loc'][0]}: {str(first['msg']).removeprefix('Value error, ')}"
        ) from error
    except DemoError as error:
        raise typer.BadParameter(str(error)) from error

    # Imported here: `covey --help` must not load Matplotlib, nor fail where the demo is not installed.
    from deploy.demo.run import run_demo

    try:
        run_demo(options)
    except DemoError as error:
        typer.echo(f"demo: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("stopped; nothing is left running", err=True)
        raise typer.Exit(130) from None
