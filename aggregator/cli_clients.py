"""The commands `covey client ...`: the client that the devices run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aggregator import cli_output as output
from aggregator.adapters.keyfiles import private_key
from aggregator.cli_options import Form, Json, Output, SignKey, Where, idle, service
from aggregator.cli_rollouts import Group, Percent, Soak, duration, percents, show
from aggregator.refusals import NoSuch, OperationRefused
from aggregator.registry.releases import release_from
from aggregator.rollout_operations import RolloutRequest
from aggregator.web.client_schemas import Release
from protocol.client_release import CLIENT, RELEASE_KIND, version_number
from protocol.identity import SignedDocument

client_app = typer.Typer(no_args_is_help=True, help="The client that the devices run, and its updates.")
_console = Console(highlight=False)


@client_app.command("publish")
def client_publish(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Bundles of one version, one for each system: covey-VERSION-SYSTEM.tar.xz.",
        ),
    ],
    sign_key: SignKey = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Publishes a version of the client; devices get it by `covey client rollout`.

    Every file in the bundles is checked, and the release is signed.

    Examples:

      covey client publish dist/covey-0.2.0-*.tar.xz

      covey client publish dist/covey-0.2.0-bookworm-arm64.tar.xz --sign-key release.pem
    """
    contents = [path.read_bytes() for path in bundles]
    signature = None
    if sign_key is not None:
        release = release_from(contents)
        document = SignedDocument.create(private_key(sign_key), RELEASE_KIND, release.to_bytes())
        signature = document.model_dump_json().encode()
    with service(state) as client:
        found = client.publish_client(contents, signature)
    _releases([found], json=json or form is Form.JSON)


@client_app.command("list")
def client_list(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Lists published versions of the client, newest first.

    Example: covey client list
    """
    with service(state) as client:
        found = client.client_releases()
    _releases(list(found), json=json or form is Form.JSON)


@client_app.command("status")
def client_status(state: Where = None, json: Json = False, form: Output = Form.TABLE) -> None:
    """Shows how many devices run each version, by system; `covey device list` shows each device's.

    Example: covey client status
    """
    with service(state) as client:
        found = client.client_versions()
    if json or form is Form.JSON:
        output.dump(found)
        return
    table = Table("client", "system", "devices", "online", box=None)
    for each in found:
        system = each.target or ("not seen yet" if not each.version else "not from a bundle: updated by hand")
        table.add_row(each.version or "–", system, str(each.devices), str(each.online))
    _console.print(table)


@client_app.command("rollout")
def client_rollout(
    version: Annotated[str, typer.Argument(help="A published version, as 0.2.0.")],
    percent: Percent = "5,25,100",
    gate: Annotated[
        list[str] | None,
        typer.Option(help="What must hold before the next wave: errors<N.", show_default=False),
    ] = None,
    soak: Soak = "10m",
    group: Group = None,
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Brings a version of the client to the devices wave by wave.

    `covey rollout status`, `pause`, `resume`, `halt` and `rollback` go on with it, as with a model's. A
    device that cannot install it, or on which it does not stay up for a minute, keeps the one before.

    Examples:

      covey client rollout 0.2.0 --percent 5,25,100 --gate "errors<0.02" --soak 1d

      covey client rollout 0.2.0 --group site=barn --percent 100
    """
    try:
        number = version_number(version)
    except ValueError as error:
        raise OperationRefused(f"{version!r} is no version of the client: write 0.2.0") from error
    request = RolloutRequest(CLIENT, number, percents(percent), tuple(gate or ()), duration(soak), group)
    with service(state) as client:
        if all(release.number != number for release in client.client_releases()):
            raise NoSuch(f"there is no published client {version}: see `covey client list`")
        found = client.start_rollout(request)
    as_json = json or form is Form.JSON
    show([found], json=as_json)
    if idle(state):
        output.hint("no aggregator is running: the rollout begins when you start `covey aggregator run`")
    if found.replaces is None and not as_json:
        output.hint(
            "there is no version to go back to: publish the one that the devices run, and roll it out first"
        )


def _releases(found: list[Release], *, json: bool) -> None:
    if json:
        output.dump(found)
        return
    if not found:
        output.line("no releases yet: publish one with `covey client publish BUNDLE...`")
        return
    table = Table("client", "stage", "systems", "published", box=None)
    for each in found:
        systems = ", ".join(f"{b.target} ({b.size / 1e6:.1f} MB)" for b in each.bundles)
        table.add_row(each.version, each.stage, systems, output.moment(each.created_at))
    _console.print(table)
