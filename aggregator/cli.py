"""The command `covey`: what an operator does. More commands join by entry points of `covey.commands`."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from aggregator import cli_output as output
from aggregator import main as covey
from aggregator.adapters.keyfiles import UnusableKeys
from aggregator.cli_access import audit_log as audit_log_command
from aggregator.cli_access import console, login, logout, token_app, whoami
from aggregator.cli_audit import audit
from aggregator.cli_campaigns import campaign_app
from aggregator.cli_clients import client_app
from aggregator.cli_evaluation import evaluate
from aggregator.cli_fleet import device_app, model_app
from aggregator.cli_options import State
from aggregator.cli_privacy import privacy_app
from aggregator.cli_queries import query_app
from aggregator.cli_rollouts import register as register_pins
from aggregator.cli_rollouts import rollout_app
from aggregator.cli_rounds import rounds_app
from aggregator.cli_secagg import secagg_app
from aggregator.client import ApiError, Unreachable
from aggregator.fleet.authority import EnrolmentRefused
from aggregator.operations import OperationRefused
from aggregator.profile import UnusableProfile
from aggregator.registry.artefacts import MissingArtefact
from aggregator.registry.publishing import PublishRefused
from aggregator.repository import RepositoryError
from aggregator.telemetry import logs
from aggregator.web.listen import CannotListen
from models import cli as model_cli
from protocol.broker_address import InvalidAddress
from protocol.dp.errors import PrivacyError

REFUSED = 1
"""Exit code: what was asked for was not done. (2 is a wrong command line, as everywhere.)"""
NOT_ALLOWED = 4
"""Exit code: the token opens nothing, or its role does not allow this."""
UNREACHABLE = 5
"""Exit code: no service answers."""


class _Commands(typer.core.TyperGroup):
    """The own commands, and those that other distributions register; one is imported when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_registered())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        entry = None if own is not None else _registered().get(cmd_name)
        if entry is None:
            return own
        loaded = entry.load()
        if not isinstance(loaded, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(loaded)
            loaded = single
        command = typer.main.get_command(loaded)
        command.name = cmd_name
        return command


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="covey.commands")}


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Federated learning for fleets of small devices: the operator's side.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong command line, 3 a watched round aborted, "
    "4 not allowed, 5 no service answers.",
)
aggregator_app = typer.Typer(no_args_is_help=True, help="The service that runs rounds.")
app.add_typer(aggregator_app, name="aggregator")
app.add_typer(device_app, name="device")
app.add_typer(model_app, name="model")
app.add_typer(rounds_app, name="round")
app.add_typer(query_app, name="query")
model_cli.register(model_app)
register_pins(model_app)
app.add_typer(rollout_app, name="rollout")
app.add_typer(client_app, name="client")
app.add_typer(campaign_app, name="campaign")
app.add_typer(privacy_app, name="privacy")
app.add_typer(secagg_app, name="secagg")
app.add_typer(token_app, name="token")
app.command("audit-log")(audit_log_command)
app.command("audit")(audit)
app.command("evaluate")(evaluate)
app.command("console")(console)
app.command("login")(login)
app.command("logout")(logout)
app.command("whoami")(whoami)


def main() -> None:
    """The console script: runs a command; errors say what to do next."""
    try:
        with _readable_errors():
            app()
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (
        EnrolmentRefused,
        FileExistsError,
        InvalidAddress,
        MissingArtefact,
        OperationRefused,
        PrivacyError,
        PublishRefused,
        RepositoryError,
        UnusableKeys,
        UnusableProfile,
        CannotListen,
        covey.AlreadyRunning,
        covey.NotInitialised,
    ) as error:
        output.fail(str(error))
        sys.exit(REFUSED)
    except ApiError as error:
        output.fail(str(error))
        sys.exit(NOT_ALLOWED if error.status in (401, 403) else REFUSED)
    except Unreachable as error:
        output.fail(str(error))
        sys.exit(UNREACHABLE)
    except OSError as error:
        output.fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(REFUSED)


def _show_version(value: bool) -> None:
    if value:
        output.line(f"covey {version('covey')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning for fleets of small devices: the operator's side."""


# --- aggregator


@aggregator_app.command("init")
def aggregator_init(
    state: State,
    fleet: Annotated[str, typer.Option(help="Name of the fleet: lower case, digits, hyphens.")] = "covey",
    broker: Annotated[
        str, typer.Option(help="Where devices reach the broker: mqtts://host:port, or mqtt:// for a trial.")
    ] = "mqtts://localhost",
    broker_name: Annotated[
        list[str] | None,
        typer.Option(help="One more host name or address of the broker, for its certificate; repeatable."),
    ] = None,
    api_url: Annotated[
        str | None,
        typer.Option(
            help="Where devices with a ticket come in, https://HOST:8443: the service listens there.",
            show_default="on this machine only",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an unencrypted broker on another machine.")
    ] = False,
    objects: Annotated[
        str | None,
        typer.Option(
            help="Where models go: s3://BUCKET/PREFIX. Keys come from where AWS tools look for them.",
            show_default="the state directory",
        ),
    ] = None,
    objects_endpoint: Annotated[
        str | None, typer.Option(help="URL of that server.", show_default="Amazon's")
    ] = None,
) -> None:
    """Makes the fleet's keys, its CA, the database, an empty registry, and what the broker is started with.

    The broker (mosquitto 2) and the aggregator get certificates of the fleet's CA; STATE/broker holds the
    broker's whole configuration. It lets every device do what concerns its own topics, and nothing else.

    The database is SQLite in the state directory, or what COVEY_DATABASE_URL names, for example
    postgresql://covey@db.local/covey. Its password belongs there, in a password file (~/.pgpass) or in
    aggregator.json: never on the command line.

    Example: covey aggregator init --fleet orchard --broker mqtts://hub.local --api-url https://hub.local:8443
    """
    try:
        covey.init(
            state,
            fleet=fleet,
            broker=broker,
            insecure=insecure,
            objects=objects,
            objects_endpoint=objects_endpoint,
            broker_names=broker_name or (),
            api_url=api_url,
        )
    except ValueError as error:
        raise OperationRefused(str(error)) from error
    output.line(f"made the fleet {fleet} in {state}; keep a copy of {state}/keys in a safe place")
    output.line(f"the first admin token is in {state}/admin-token, for `covey login` on another machine")
    start = "mosquitto" if broker.startswith("mqtt://") else f"sh {state}/broker/start"
    output.line(f"next:  {start}")
    output.line(f"       covey aggregator run --state {state}")
    output.line(f"       covey model publish DIR --state {state}")
    if api_url is not None:
        output.line(f"       covey device token --count 5 --expires 7d --state {state}")


@aggregator_app.command("broker")
def aggregator_broker(
    state: State,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A host name or address of the broker, for its certificate; repeatable."),
    ] = None,
) -> None:
    """Writes the broker's configuration anew, with fresh certificates: before they end, or for another name.

    Example: covey aggregator broker --name broker.local --name 10.0.0.5
    """
    try:
        directory = covey.write_broker(state, name or ())
    except ValueError as error:
        raise OperationRefused(str(error)) from error
    output.line(f"wrote {directory}; restart the broker there, then the aggregator")


@aggregator_app.command("migrate")
def aggregator_migrate(state: State) -> None:
    """Brings the database to the schema of this version of Covey, after an upgrade.

    All of it or nothing: when it fails, the database is as it was. Stop the service and keep a copy first.

    Example: covey aggregator migrate
    """
    before, now = covey.migrate(state)
    if before == now:
        output.line(f"the database has schema {now} already: nothing to do")
    else:
        output.line(f"the database has schema {now} now; it had {before or 'none'}")


@aggregator_app.command("run")
def aggregator_run(
    state: State,
    broker: Annotated[
        str | None,
        typer.Option(help="Use this broker, not the one in the settings.", show_default=False),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an unencrypted broker on another machine.")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(
            help="Where the API is: host:port, with TLS when it is not a loopback address.",
            show_default="127.0.0.1:8443, or `listen` in the settings",
        ),
    ] = None,
    log: Annotated[
        logs.LogForm, typer.Option(envvar="COVEY_LOG", help="Lines for people or for machines.")
    ] = logs.LogForm.CONSOLE,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Runs the service until it is told to stop (Ctrl-C or SIGTERM).

    It may be killed at any moment: after a restart, rounds go on where they were.

    Example: covey aggregator run --broker mqtt://127.0.0.1:1883 --listen 0.0.0.0:8443
    """
    logs.start(log, logging.DEBUG if verbose else logging.INFO)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    covey.run(state, stop, broker=broker, insecure=insecure, listen=listen, loaded=_settle)


def _settle() -> None:
    """Spares what was imported the collector of cycles, which took 16 ms to look through it each time."""
    gc.collect()
    gc.freeze()
