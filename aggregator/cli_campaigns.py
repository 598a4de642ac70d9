"""The commands `covey campaign ...`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, Where, idle, service
from aggregator.cli_training import training_options
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.schedule import UTC
from aggregator.settings import CampaignRequest
from aggregator.web.schemas import Campaign

campaign_app = typer.Typer(
    no_args_is_help=True, help="Campaigns: rounds one after the other, or on a schedule."
)

Which = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="Id of a campaign, or its beginning.")]


@campaign_app.command("create")
@training_options
def campaign_create(
    request: CampaignRequest,
    state: Where = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="When a round is due, as cron says it: minute, hour, day of month, month, day of week.",
            show_default="each round follows on the one before",
        ),
    ] = None,
    time_zone: Annotated[str, typer.Option(help="Of the schedule, such as Europe/Berlin.")] = UTC,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Creates a campaign. One that is scheduled runs a round each time; what was missed comes to one round.

    Examples:

      covey campaign create --model watch --rounds 50 --cohort 40 --privacy plan.json --schedule "0 2 * * *"

      covey campaign create --model watch --mode buffered --buffer 10 --max-staleness 8

      covey campaign create --model watch --where "power=mains,metered=no" --over-select 1.3
    """
    request = dataclasses.replace(request, schedule=schedule, time_zone=time_zone)
    with service(state) as client:
        output.campaigns([client.start_rounds(request)], json=json or form is Form.JSON)
    if idle(state):
        output.hint("no aggregator is running: the rounds begin when you start `covey aggregator run`")


@campaign_app.command("list")
def campaign_list(
    state: Where = None,
    active: Annotated[bool, typer.Option("--active", help="Only those that have rounds to run.")] = False,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Lists campaigns.

    Example: covey campaign list --active
    """
    with service(state) as client:
        found = client.campaigns(active=active)
    if found or json or form is Form.JSON:
        output.campaigns(found, json=json or form is Form.JSON)
    else:
        output.line("no campaigns yet: create one with `covey campaign create --model NAME`")


@campaign_app.command("show")
def campaign_show(
    campaign: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE
) -> None:
    """Shows a campaign and its rounds.

    Example: covey campaign show 3f2a9c10
    """
    with service(state) as client:
        found = _one(client, campaign)
        rounds = client.rounds(found.campaign)
    output.status([found], rounds, json=json or form is Form.JSON)


@campaign_app.command("pause")
def campaign_pause(
    campaign: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE
) -> None:
    """Begins no more rounds of a campaign until it is resumed; a round that runs goes to its end.

    Example: covey campaign pause 3f2a9c10
    """
    with service(state) as client:
        moved = client.pause_campaign(_one(client, campaign).campaign)
    output.campaigns([moved], json=json or form is Form.JSON)


@campaign_app.command("resume")
def campaign_resume(
    campaign: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE
) -> None:
    """Goes on with a paused campaign; with a schedule, from its next firing.

    Example: covey campaign resume 3f2a9c10
    """
    with service(state) as client:
        moved = client.resume_campaign(_one(client, campaign).campaign)
    output.campaigns([moved], json=json or form is Form.JSON)


@campaign_app.command("cancel")
def campaign_cancel(
    campaign: Which, state: Where = None, json: Json = False, form: Output = Form.TABLE
) -> None:
    """Ends a campaign for good; a round of it that runs is aborted.

    Example: covey campaign cancel 3f2a9c10
    """
    with service(state) as client:
        moved = client.cancel_campaign(_one(client, campaign).campaign)
    output.campaigns([moved], json=json or form is Form.JSON)


def _one(client: Client, begins: str) -> Campaign:
    found = [each for each in client.campaigns() if each.campaign.startswith(begins)]
    if len(found) != 1:
        problem = "several campaigns begin" if found else "no campaign begins"
        raise OperationRefused(f"{problem} with {begins}: see `covey campaign list`")
    return found[0]
