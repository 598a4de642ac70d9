"""The commands `covey device revoke`, `retire` and `move`."""

from __future__ import annotations

from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator.cli_options import Where, service

Device = Annotated[str, typer.Argument(help="Id of the device.")]


def register(app: typer.Typer) -> None:
    """Adds them to the commands about devices."""
    app.command("revoke")(device_revoke)
    app.command("retire")(device_retire)
    app.command("move")(device_move)


def device_revoke(
    device: Device,
    reason: Annotated[str, typer.Option(help="Why; kept with its certificates.")] = "by the operator",
    state: Where = None,
) -> None:
    """Takes a device's right to be in the fleet, for one that is stolen or that lies.

    The broker ends its connection within seconds, and lets it in no more. A round that runs goes on without
    it, as without any device that drops out. A ticket of `covey device token --replace` lets it in again.

    Example: covey device revoke barn-1 --reason stolen
    """
    with service(state) as client:
        client.revoke_device(device, reason)
    output.line(f"{device} is revoked: a service that runs tells the broker within seconds")
    output.line(f"`covey device token --name {device} --replace` lets it, or another in its place, in again")


def device_retire(device: Device, state: Where = None) -> None:
    """Ends a device's time in the fleet: it is broken, sold or put away.

    What it contributed stays in the versions, and what is known of it in the lists. Nothing else differs from
    `covey device revoke`.

    Example: covey device retire barn-1
    """
    with service(state) as client:
        client.retire_device(device)
    output.line(f"{device} is retired: a service that runs tells the broker within seconds")


def device_move(
    device: Device,
    labels: Annotated[list[str], typer.Argument(help="Where it is now, such as site=south.")],
    state: Where = None,
) -> None:
    """Moves a device to another site or group: gives it labels, in place of those that say otherwise.

    site=south replaces site=north; other labels stay (`covey device label` replaces all). What goes by
    labels, such as pins, rollouts and `--where` of campaigns, goes by the new ones from now on.

    Example: covey device move barn-1 site=south
    """
    with service(state) as client:
        found = client.move_device(device, tuple(labels))
    output.line(f"{device} has the labels {', '.join(found.labels)}")
