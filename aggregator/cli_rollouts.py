"""The commands `covey rollout ...`, and those of `covey model ...` about who has which version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, idle, service
from aggregator.client import Client
from aggregator.refusals import NoSuch, OperationRefused
from aggregator.rollout_operations import RolloutRequest, Turn
from aggregator.web.rollout_schemas import Rollout
from protocol.client_release import numbered

rollout_app = typer.Typer(no_args_is_help=True, help="Versions on their way to the fleet.")

Id = Annotated[
    str | None, typer.Argument(help="Id of the rollout, or its beginning.", show_default="the last one")
]
Reason = Annotated[str, typer.Option(help="Why; kept with the rollout.")]
Percent = Annotated[str, typer.Option(help="Of the devices that each wave reaches, rising to 100.")]
Soak = Annotated[str, typer.Option(help="How long each wave is watched: 90s, 30m, 1h, 2d.")]
Group = Annotated[
    str | None, typer.Option(help="Only devices with this label.", show_default="the whole fleet")
]
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_console = Console(highlight=False)


@rollout_app.command("start")
def rollout_start(
    model: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[int, typer.Option(min=1, help="Its version.")],
    percent: Percent = "5,25,100",
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="What must hold before the next wave: accuracy>=N, loss<N (of `covey evaluate`), errors<N.",
            show_default=False,
        ),
    ] = None,
    soak: Soak = "0s",
    group: Group = None,
    seed: Annotated[
        str | None, typer.Option(help="Orders the devices; 64 hexadecimal digits.", show_default="random")
    ] = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Brings a version to the fleet wave by wave; a failed gate takes it back by itself.

    Examples:

      covey rollout start --model watch --version 12 --percent 5,25,100 --gate "accuracy>=0.8" \\
        --gate "errors<0.01" --soak 1h

      covey rollout start --model watch --version 12 --group site=barn --percent 100
    """
    request = RolloutRequest(
        model, version, percents(percent), tuple(gate or ()), duration(soak), group, seed
    )
    with service(state) as client:
        found = client.start_rollout(request)
    if idle(state):
        output.hint("no aggregator is running: the rollout begins when you start `covey aggregator run`")
    show([found], json=json or form is Form.JSON)


@rollout_app.command("status")
def rollout_status(
    rollout: Id = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.", show_default=False)] = None,
    devices: Annotated[
        bool, typer.Option("--devices", help="List the devices that it has reached, by wave order.")
    ] = False,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows rollouts; with an id, one of them and all that happened to it.

    Example: covey rollout status --model watch
    """
    as_json = json or form is Form.JSON
    with service(state) as client:
        if devices:
            reached = client.rollout_devices(_find(client, rollout, model).rollout)
            if as_json:
                output.dump(reached)
            else:
                for device_id in reached.devices:
                    output.line(device_id)
            return
        if rollout is None:
            show(client.rollouts(model), json=as_json)
            return
        found = _find(client, rollout, model)
    show([found], json=as_json)
    if not as_json:
        for step in found.steps:
            detail = f": {step.detail}" if step.detail else ""
            output.line(f"{output.moment(step.at)}  wave {step.wave + 1}  {step.what}{detail}")


@rollout_app.command("pause")
def rollout_pause(rollout: Id = None, reason: Reason = "by the operator", state: Where = None) -> None:
    """Lets nothing move, neither forth nor back, until `covey rollout resume`.

    Example: covey rollout pause --reason "looking at device barn-3"
    """
    _turn(rollout, "pause", reason, state)


@rollout_app.command("resume")
def rollout_resume(rollout: Id = None, state: Where = None) -> None:
    """Lets a paused rollout go on; its wave soaks anew.

    Example: covey rollout resume
    """
    _turn(rollout, "resume", "", state)


@rollout_app.command("halt")
def rollout_halt(rollout: Id = None, reason: Reason = "by the operator", state: Where = None) -> None:
    """Ends a rollout where it is: no more devices get the version, and none gives it back.

    Example: covey rollout halt --reason "too slow on a Pi Zero"
    """
    _turn(rollout, "halt", reason, state)


@rollout_app.command("rollback")
def rollout_rollback(rollout: Id = None, reason: Reason = "by the operator", state: Where = None) -> None:
    """Takes a version back from every device that its rollout has reached; the version is withdrawn.

    Example: covey rollout rollback --reason "wrong labels"
    """
    _turn(rollout, "rollback", reason, state)


def register(model_app: typer.Typer) -> None:
    """Adds the commands of `covey model` that say who has which version."""
    model_app.command("pin")(model_pin)
    model_app.command("unpin")(model_unpin)
    model_app.command("pins")(model_pins)
    model_app.command("withdraw")(model_withdraw)


OfDevice = Annotated[str | None, typer.Option(help="Id of a device.", show_default=False)]
OfGroup = Annotated[str | None, typer.Option(help="Label of devices.", show_default=False)]


def model_pin(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Option(min=1, help="Its version.")],
    device: OfDevice = None,
    group: OfGroup = None,
    state: Where = None,
) -> None:
    """Gives a device, or every device with a label, a version of its own, whatever the fleet gets.

    Examples:

      covey model pin watch --version 11 --device barn-1

      covey model pin watch --version 11 --group site=barn
    """
    with service(state) as client:
        pin = client.pin(model, version, device=device, group=group)
    output.line(f"{pin.target} is to have {model} version {version}, until `covey model unpin {model}`")


def model_unpin(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    device: OfDevice = None,
    group: OfGroup = None,
    state: Where = None,
) -> None:
    """Lets a device, or those with a label, have what the fleet has again.

    Example: covey model unpin watch --device barn-1
    """
    with service(state) as client:
        client.unpin(model, device=device, group=group)
    output.line(f"{device or group} is to have the {model} that the fleet has")


def model_pins(
    model: Annotated[str | None, typer.Argument(help="Name of the model.", show_default="all")] = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Lists devices and groups that have a version of their own.

    Example: covey model pins watch
    """
    with service(state) as client:
        found = client.pins(model)
    if json or form is Form.JSON:
        output.dump(found)
        return
    if not found:
        output.line("no pins: every device has what the fleet has")
        return
    table = Table("model", "version", "for", "", "since", box=None)
    for pin in found:
        table.add_row(pin.model, str(pin.version), pin.kind, escape(pin.target), output.moment(pin.at))
    _console.print(table)


def model_withdraw(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Option(min=1, help="The version to take back.")],
    state: Where = None,
) -> None:
    """Takes a version back for good: devices return to the newest stable one that is left.

    No round begins with it, either. There is no way back: publish another version.

    Example: covey model withdraw watch --version 12
    """
    with service(state) as client:
        client.withdraw(model, version)
    output.line(f"{model} version {version} is withdrawn")


def duration(text: str) -> float:
    """Seconds of a text such as `90s`, `30m`, `1h` or `2d`.

    Raises:
        OperationRefused: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhd])", text.strip())
    if match is None:
        raise OperationRefused(f"{text!r} is no time: write 90s, 30m, 1h or 2d")
    return float(match[1]) * _SECONDS[match[2]]


def percents(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OperationRefused(f"{text!r} is no list of percents: write 5,25,100") from error


def _turn(rollout: str | None, turn: Turn, reason: str, state: Where) -> None:
    with service(state) as client:
        found = client.turn_rollout(_find(client, rollout, None).rollout, turn, reason)
    show([found], json=False)


def _find(client: Client, beginning: str | None, model: str | None) -> Rollout:
    found = client.rollouts(model)
    if beginning is not None:
        found = tuple(each for each in found if each.rollout.startswith(beginning))
        if len(found) > 1:
            raise OperationRefused(f"{len(found)} rollouts begin with {beginning}: write more of the id")
    if not found:
        raise NoSuch("there is no such rollout: see `covey rollout status`")
    return found[-1]


def show(found: Sequence[Rollout], *, json: bool) -> None:
    if json:
        output.dump(found)
        return
    if not found:
        output.line("no rollouts yet: begin one with `covey rollout start --model NAME --version N`")
        return
    table = Table("rollout", "version", "for", "status", "percent", "serving", "failed", box=None)
    for each in found:
        sight = each.sight
        table.add_row(
            each.rollout[:8],
            f"{each.model} {numbered(each.version, each.model)}",
            escape(each.group or "fleet"),
            f"[{_STYLES[each.status]}]{each.status}[/]",
            f"{each.percent:g}",
            "" if sight is None else f"{sight.serving}/{sight.size}",
            "" if sight is None else str(sight.failed),
        )
    _console.print(table)
    for each in found:
        if each.note:
            output.line(f"{each.rollout[:8]} {each.note}")


_STYLES = {
    "running": "cyan",
    "paused": "yellow",
    "halted": "red",
    "rolled-back": "red",
    "completed": "green",
}
