"""The commands `covey round ...`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, idle, service
from aggregator.cli_training import training_options
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.settings import CampaignRequest

ABORTED = 3
"""Exit code of `watch`: a round aborted, or the campaign failed."""
POLL_SECONDS = 0.25

rounds_app = typer.Typer(no_args_is_help=True, help="Rounds of training.")


@rounds_app.command("start")
@training_options
def round_start(
    request: CampaignRequest,
    state: Where = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and watch.")] = False,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Asks for rounds; the running service runs them one after the other. Short for `covey campaign create`.

    Examples:

      covey round start --model watch --watch

      covey round start --model watch --rounds 20 --privacy distributed --noise-multiplier 0.8 --max-epsilon 8
    """
    as_json = json or form is Form.JSON
    with service(state) as client:
        campaign = client.start_rounds(request)
        if not watch:
            output.campaigns([campaign], json=as_json)
        if idle(state):
            output.hint("no aggregator is running: the rounds begin when you start `covey aggregator run`")
        if watch:
            _watch(client, campaign.campaign, json=as_json)


@rounds_app.command("status")
def round_status(
    state: Where = None,
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many rounds to show.")] = 20,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows campaigns and their latest rounds.

    Example: covey round status --json
    """
    with service(state) as client:
        campaigns = client.campaigns()
        rounds = client.rounds(last=last)
    output.status(campaigns, rounds, json=json or form is Form.JSON)
    if idle(state):
        output.hint("no aggregator is running: start it with `covey aggregator run`")


@rounds_app.command("watch")
def round_watch(
    state: Where = None,
    campaign: Annotated[
        str | None, typer.Option(help="Id of a campaign.", show_default="the one that is running")
    ] = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Watches a campaign until its last round has ended.

    With --json, one line for every change of a round. Exit code 3 when a round aborted.

    Example: covey round watch
    """
    with service(state) as client:
        if campaign is None:
            candidates = client.campaigns(active=True) or client.campaigns()[-1:]
            if not candidates:
                raise OperationRefused("no rounds have been asked for: use `covey round start`")
            campaign = candidates[0].campaign
        _watch(client, campaign, json=json or form is Form.JSON)


@rounds_app.command("selection")
def round_selection(
    round_id: Annotated[str, typer.Argument(help="Id of a round, or its beginning.")],
    state: Where = None,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Shows how a round's cohort was drawn, and draws it again. Exit code 3 when the draw gives others.

    Example: covey round selection 3f2a9c10
    """
    with service(state) as client:
        found = [each for each in client.rounds() if each.round.startswith(round_id)]
        if len(found) != 1:
            problem = "several rounds begin" if found else "no round begins"
            raise OperationRefused(f"{problem} with {round_id}: see `covey round status`")
        drawn = client.selection(found[0].round)
    if json or form is Form.JSON:
        output.dump(drawn)
    else:
        output.line(
            f"seed {drawn.seed.hex()}: {drawn.places} places, {len(drawn.pool)} devices to choose from"
        )
        output.line(f"yielding: {', '.join(drawn.yielding) or 'nobody'}")
        output.line(f"chosen:   {', '.join(drawn.chosen)}")
    if drawn.chosen != found[0].invited:
        output.fail(f"the round invited others: {', '.join(found[0].invited)}")
        raise typer.Exit(ABORTED)


def _watch(client: Client, campaign_id: str, *, json: bool) -> None:
    with output.Watcher(json=json) as watcher:
        while True:
            # In this order: a campaign that is over has shown its last round.
            campaign = client.campaign(campaign_id)
            rounds = client.rounds(campaign_id)
            watcher.show(campaign, rounds)
            if campaign.status in ("finished", "failed", "cancelled"):
                break
            time.sleep(POLL_SECONDS)
    if campaign.status != "finished":
        output.fail(f"the campaign {campaign.status}: {campaign.note}")
        raise typer.Exit(ABORTED)
    if any(each.status == "aborted" for each in rounds):
        raise typer.Exit(ABORTED)
