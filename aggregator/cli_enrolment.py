"""The commands `covey device token ...`: tickets that let devices into the fleet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aggregator import cli_enrolment_output as enrolment_output
from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, seconds, service
from aggregator.private_file import write_private
from aggregator.refusals import OperationRefused
from aggregator.web.enrolment_schemas import MAX_TICKET_DAYS, EnrolmentTokenRequest, NewEnrolmentToken

ticket_app = typer.Typer(help="Tickets, each of which lets one device into the fleet.")


class Picture(StrEnum):
    """What a QR code is drawn as."""

    SVG = "svg"
    PNG = "png"


@ticket_app.callback(invoke_without_command=True)
def make_tickets(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 1,
    name: Annotated[
        str, typer.Option(help="Id of the device; {n} counts, past the names that are taken.")
    ] = "device-{n}",
    first: Annotated[int, typer.Option(min=0, help="Where {n} starts.")] = 1,
    label: Annotated[
        list[str] | None, typer.Option(help="A label that the devices get; repeatable.", show_default=False)
    ] = None,
    expires: Annotated[str, typer.Option(help="After how long: 7d, 12h, 90m; 90 days at most.")] = "7d",
    replace: Annotated[
        bool, typer.Option("--replace", help="The device takes the place of the enrolled one of this name.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="Where devices reach the API, https://HOST:8443.",
            show_default="`api_url` in the settings",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="A new file for the tickets, one a line.", show_default="print"),
    ] = None,
    qr: Annotated[bool, typer.Option("--qr", help="Show each ticket as a QR code, too.")] = False,
    qr_dir: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Write NAME.svg with its QR code for each here.", show_default=False
        ),
    ] = None,
    qr_as: Annotated[Picture, typer.Option(help="What --qr-dir writes.")] = Picture.SVG,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Makes tickets and prints them, this once, one a line; each lets one device in, as `covey-edge enroll`.

    A ticket is a secret until it is used: files are readable by their owner only.

    Examples:

      covey device token --count 50 --name barn-{n} --label site=barn --expires 7d --out barn.tickets

      covey device token --name barn-3 --qr

      covey device token --name barn-3 --replace > barn-3.ticket
    """
    if context.invoked_subcommand is not None:
        return
    if out is not None and out.exists():
        # Before the tickets are made: they are shown once.
        raise OperationRefused(f"{out} is there already: choose another name")
    with service(state) as client:
        made = client.make_tickets(
            EnrolmentTokenRequest(
                amount=count,
                name=name,
                first=first,
                labels=tuple(label or ()),
                seconds=seconds(expires, MAX_TICKET_DAYS),
                replaces=replace,
                url=url,
            )
        )
    lines = [each.ticket for each in made]
    if out is not None:
        write_private(out, "".join(f"{line}\n" for line in lines).encode())
        output.line(f"{out} has {len(made)} tickets: {_span(made)}; they expire in {expires}")
    elif json or form is Form.JSON:
        output.dump(made)
    else:
        output.hint(f"{len(made)} tickets: {_span(made)}; they expire in {expires}, and are shown this once:")
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    if qr:
        enrolment_output.qr_codes(made)
    if qr_dir is not None:
        _pictures(qr_dir, made, qr_as)
        output.line(f"{qr_dir} has their QR codes")


@ticket_app.command("list")
def list_tickets(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Lists tickets, without what opens them, and who came in by them.

    Example: covey device token list
    """
    with service(state) as client:
        enrolment_output.tokens(client.enrolment_tokens(), json=json or form is Form.JSON)


@ticket_app.command("revoke")
def revoke_ticket(
    token: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")], state: Where = None
) -> None:
    """Revokes a ticket. A device that came in by it stays.

    Example: covey device token revoke 3f2a91c07d5e
    """
    with service(state) as client:
        found = client.revoke_enrolment_token(token)
    output.line(f"{token} lets nobody in any more")
    if found.used_at is not None:
        output.hint(f"{found.name} came in by it, and stays")


def _span(made: Sequence[NewEnrolmentToken]) -> str:
    return made[0].name if len(made) == 1 else f"{made[0].name} to {made[-1].name}"


def _pictures(directory: Path, made: Iterable[NewEnrolmentToken], kind: Picture) -> None:
    import io

    import segno

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in made:
        buffer = io.BytesIO()
        segno.make_qr(each.ticket).save(buffer, kind=kind.value, scale=5)
        write_private(directory / f"{each.name}.{kind.value}", buffer.getvalue())
