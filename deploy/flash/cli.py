"""The command `covey flash`, found by the `covey` program through its entry point."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from aggregator.cli_options import Where, service
from deploy.flash import run
from deploy.flash.card import WriteError
from deploy.flash.fat import BootPartitionError
from deploy.flash.firstboot import Mechanism, Provision, ProvisionError, Wifi
from deploy.flash.payload import DEFAULT_DATA, Client, payload, read_tickets, usual_bundles
from deploy.flash.source import Image, ImageError
from deploy.flash.ssh import Remote, RemoteError, install, update
from deploy.flash.ssh import hostname as own_hostname
from deploy.flash.targets import RefusedTarget
from protocol.enrolment import EnrolmentTicket

_REFUSED = 3
_UPDATE_SECONDS = 900.0
"""Longest wait for an update: unpacked, tried, and watched for a minute, on a slow device."""
_POLL_SECONDS = 5.0


def flash(
    image: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Raspberry Pi OS Lite or Debian for arm64: .img, .img.xz or .zip.",
            show_default=False,
        ),
    ] = None,
    hostname: Annotated[
        str | None,
        typer.Option(
            help="Name of the device, in its network and its fleet; {n} counts.",
            show_default="as its ticket says, else covey-{n}; with --ssh its own",
        ),
    ] = None,
    device: Annotated[
        Path | None, typer.Option(help="The card, as /dev/sdX: erased.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write this image file instead; {n} counts.", show_default=False),
    ] = None,
    boot_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Only provision this mounted boot partition.",
            show_default=False,
        ),
    ] = None,
    ssh: Annotated[
        str | None,
        typer.Option(
            help="Install on this running device, USER@HOST or ssh://USER@HOST:PORT, and enrol it.",
            show_default=False,
        ),
    ] = None,
    ssh_config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="For --ssh: as ssh -F.", show_default=False),
    ] = None,
    tickets: Annotated[
        Path | None,
        typer.Option(
            "--tickets",
            "--ticket",
            help="Tickets of `covey device token`, one a line, for each device one; - is standard input.",
            show_default="an operator enrols the device later",
        ),
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(help="mqtts://HOST, where the fleet meets.", show_default="as its enrolment says"),
    ] = None,
    wifi: Annotated[
        str | None,
        typer.Option(help="SSID or SSID:COUNTRY; the password is asked for.", show_default="by cable"),
    ] = None,
    wifi_password_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Its password, in place of asking.", show_default=False
        ),
    ] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Public key that may log in; may be repeated.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[str, typer.Option(help="The account that --ssh-key is for.")] = "covey-admin",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many cards, one after the other.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="Where {n} starts.")] = 1,
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="Client bundle; may be repeated.", show_default="those in dist/"
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="Folder of the device's own data.")] = DEFAULT_DATA,
    mechanism: Annotated[
        Mechanism | None,
        typer.Option(help="Who sets the device up.", show_default="by what the boot partition holds"),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(help="Checksum of IMAGE as downloaded.", show_default="IMAGE.sha256, if it is there"),
    ] = None,
    disable_verify: Annotated[
        bool, typer.Option("--disable-verify", help="Do not read the card back.")
    ] = False,
    enable_writing_system_drives: Annotated[
        bool,
        typer.Option(
            "--enable-writing-system-drives",
            help="Allow disks above 256 GB, and parts of LVM and RAID. What is mounted stays refused.",
        ),
    ] = False,
    state: Where = None,
) -> None:
    """Writes an image and lets the device join its fleet at the first boot, without a keyboard.

    Standard input is for secrets (tickets, the wireless password): none of them is an argument, which
    everybody on this machine could read. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused that disk.

    Examples:

      covey flash raspios-lite-arm64.img.xz --device /dev/sdb --tickets barn-1.ticket

      covey flash raspios.img.xz --out "card-{n}.img" --count 20 --tickets barn.tickets

      covey flash --ssh pi@barn-1.local --tickets barn-1.ticket

      covey flash --boot-dir /Volumes/bootfs --hostname barn-1 --wifi orchard:SE --broker mqtts://hub.example
    """
    alone = boot_dir is not None or ssh is not None
    if sum(where is not None for where in (device, out, boot_dir, ssh)) != 1:
        raise typer.BadParameter("one of --device, --out, --boot-dir and --ssh says where to")
    if (image is None) != alone:
        raise typer.BadParameter("IMAGE goes with --device and --out only")
    if count > 1 and (alone or (out is not None and run.NUMBER not in str(out))):
        raise typer.BadParameter(f"several devices need --device, or --out with {run.NUMBER} in its name")
    try:
        if tickets is None and broker is None and ssh is None:
            raise ProvisionError("without --tickets, say where the fleet meets: --broker mqtts://HOST")
        given: Sequence[EnrolmentTicket | None] = (
            [None] * count if tickets is None else read_tickets(_text(tickets, "tickets"), count)
        )
        client = Client(tuple(bundle or usual_bundles()), broker, data)
        if ssh is not None:
            _over_ssh(Remote(ssh, ssh_config), client, hostname, given[0], state)
            return
        names = run.device_names(given, hostname, count, first)
        network = None if wifi is None else Wifi.parse(wifi, _wifi_password(wifi_password_file, tickets))
        keys = tuple(line for path in ssh_key or () for line in path.read_text().splitlines() if line.strip())
        # All of them before the first card is written: the twentieth name may be too long.
        provisions = [Provision(name, str(uuid.uuid4()), user, keys, network) for name in names]
        opened = None if image is None else Image.open(image)
        if opened is not None and opened.check(sha256) is None:
            _say(f"there is no checksum to compare {opened.path} with: --sha256 gives one")
        for index, (provision, its_ticket) in enumerate(zip(provisions, given, strict=True)):
            name = provision.hostname
            files = payload(client, name, its_ticket)
            if boot_dir is not None:
                used = run.write_folder(boot_dir, provision, files, mechanism)
            elif out is not None and opened is not None:
                path = Path(str(out).replace(run.NUMBER, str(first + index)))
                used = run.write_file(opened, path, provision, files, mechanism)
            elif device is not None and opened is not None:
                if index:
                    typer.prompt(f"Put the card of {name} into {device}, then press Enter", default="")
                used = run.write_card(
                    opened,
                    device,
                    provision,
                    files,
                    mechanism,
                    ask=typer.prompt,
                    verify=not disable_verify,
                    system_drives=enable_writing_system_drives,
                )
            _say(f"{name} is ready: {used} sets it up at its first boot")
    except RefusedTarget as error:
        _say(f"refused: {error}")
        raise typer.Exit(_REFUSED) from error
    except (ProvisionError, RemoteError, ImageError, WriteError, BootPartitionError) as error:
        _say(str(error))
        raise typer.Exit(1) from error


def _over_ssh(
    remote: Remote, client: Client, hostname: str | None, ticket: EnrolmentTicket | None, state: Path | None
) -> None:
    name = hostname or (own_hostname(remote) if ticket is None else ticket.name)
    Provision(name, "")  # refuses names that no device can have

    def enrol(request: bytes) -> bytes:
        with service(state) as operator:
            return operator.enrol(request).to_bytes()

    fresh = install(remote, payload(client, name, ticket), enrol, ticket=ticket is not None)
    _say(f"{name} {'has the client now' if fresh else 'had the client'}, is enrolled, and runs")
    give_up = time.monotonic() + _UPDATE_SECONDS

    def wait() -> bool:
        time.sleep(_POLL_SECONDS)
        return time.monotonic() < give_up

    version = update(remote, client.bundles, wait)
    if version is not None:
        _say(f"{name} took the update to {version}")


def _wifi_password(file: Path | None, tickets: Path | None) -> str | None:
    if file is not None:
        return _text(file, "the password").rstrip("\r\n") or None
    if str(tickets) == "-":
        raise ProvisionError("standard input holds the tickets: give the password by --wifi-password-file")
    if sys.stdin.isatty():
        return str(typer.prompt("Password (empty: an open network)", default="", hide_input=True)) or None
    return sys.stdin.readline().rstrip("\r\n") or None


def _text(path: Path, what: str) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ProvisionError(f"cannot read {what} from {path}") from error


def _say(text: str) -> None:
    typer.echo(f"flash: {text}", err=True)
