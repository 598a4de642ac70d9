"""The commands `covey round ...`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator.cli_options import Form, Json, Output, OverSelect, Where, WhichDevices, idle, service
from aggregator.client import Client
from aggregator.operations import OperationRefused
from aggregator.settings import DEFAULT_REST_ROUNDS, CampaignRequest
from protocol.dp.parameters import PrivacyMode
from protocol.plan import SUBCOHORT_LIMIT, Deadlines

ABORTED = 3
"""Exit code of `watch`: a round aborted, or the campaign failed."""
POLL_SECONDS = 0.25

_LIMITS = Deadlines()

rounds_app = typer.Typer(no_args_is_help=True, help="Rounds of training.")


@rounds_app.command("start")
def round_start(
    model: Annotated[str, typer.Option(help="The model to train.")],
    state: Where = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How many rounds.", show_default="the model's recipe")
    ] = None,
    cohort: Annotated[int, typer.Option(min=2, help="Devices in a full cohort.")] = 10,
    minimum: Annotated[
        int | None,
        typer.Option(
            min=2, help="Check-ins that a roster needs.", show_default="above 2/3 of a (sub-)cohort"
        ),
    ] = None,
    min_survivors: Annotated[
        int | None,
        typer.Option(min=2, help="Masked inputs that a sum needs.", show_default="as many as --minimum"),
    ] = None,
    subcohort_limit: Annotated[
        int, typer.Option(min=2, help="Split a larger cohort: its parts hide, and fail, by themselves.")
    ] = SUBCOHORT_LIMIT,
    local_epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over local data.", show_default="the model's recipe")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Local learning rate.", show_default="the model's recipe")
    ] = None,
    privacy: Annotated[
        PrivacyMode,
        typer.Option(help="Who adds noise: nobody, the aggregator, every device, each to its own training."),
    ] = PrivacyMode.NONE,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="Noise over sensitivity.", show_default="1 where there is noise"),
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="L2 bound of one update.", show_default="the model's recipe")
    ] = None,
    adaptive_clip: Annotated[
        float | None,
        typer.Option(help="Let C follow this quantile of the updates' norms.", show_default="C is fixed"),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(min=8, max=32, help="Bits of one coordinate on the wire.", show_default="by the cohort"),
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    max_epsilon: Annotated[
        float | None,
        typer.Option(help="Start no round that would take the fleet beyond it.", show_default="no limit"),
    ] = None,
    restart_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Central mode: noise of a tree over so many rounds (DP-FTRL); no device is in two of them.",
            show_default="every round has noise of its own",
        ),
    ] = None,
    example_clip: Annotated[
        float | None, typer.Option(help="Mode example: L2 bound of one example's gradient.", show_default="1")
    ] = None,
    sampling: Annotated[
        float | None,
        typer.Option(help="Mode example: chance of an example to be in one step.", show_default="0.1"),
    ] = None,
    gather: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for a full cohort.", rich_help_panel="Deadlines")
    ] = 3.0,
    advertise_seconds: Annotated[
        float, typer.Option(min=0.1, help="Check-in.", rich_help_panel="Deadlines")
    ] = _LIMITS.advertise_keys,
    share_seconds: Annotated[
        float, typer.Option(min=0.1, help="Exchange of shares.", rich_help_panel="Deadlines")
    ] = _LIMITS.share_keys,
    input_seconds: Annotated[
        float, typer.Option(min=0.1, help="Training and upload.", rich_help_panel="Deadlines")
    ] = _LIMITS.masked_input,
    check_seconds: Annotated[
        float, typer.Option(min=0.1, help="Consistency check.", rich_help_panel="Deadlines")
    ] = _LIMITS.consistency_check,
    unmask_seconds: Annotated[
        float, typer.Option(min=0.1, help="Unmasking.", rich_help_panel="Deadlines")
    ] = _LIMITS.unmasking,
    offline_grace: Annotated[
        float,
        typer.Option(
            min=0.0, help="How long a device that is offline is waited for.", rich_help_panel="Deadlines"
        ),
    ] = _LIMITS.offline_grace,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the cohorts.", show_default="random")] = None,
    where: WhichDevices = "",
    rest: Annotated[
        int, typer.Option(min=0, max=1000, help="Who was in one of so many rounds before yields to others.")
    ] = DEFAULT_REST_ROUNDS,
    over_select: OverSelect = 1.0,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and watch.")] = False,
    json: Json = False,
    form: Output = Form.TABLE,
) -> None:
    """Asks for rounds; the running service runs them one after the other.

    Examples:

      covey round start --model watch --watch

      covey round start --model watch --rounds 20 --privacy distributed --noise-multiplier 0.8 --max-epsilon 8
    """
    request = CampaignRequest(
        model=model,
        rounds=rounds,
        cohort=cohort,
        minimum=minimum,
        min_survivors=min_survivors,
        subcohort_limit=subcohort_limit,
        local_epochs=local_epochs,
        learning_rate=lr,
        privacy=privacy,
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        adaptive_quantile=adaptive_clip,
        bits=bits,
        delta=delta,
        deadlines=Deadlines(
            advertise_keys=advertise_seconds,
            share_keys=share_seconds,
            masked_input=input_seconds,
            consistency_check=check_seconds,
            unmasking=unmask_seconds,
            offline_grace=offline_grace,
        ),
        gather_seconds=gather,
        epsilon_limit=max_epsilon,
        restart_every=restart_every,
        example_clip_norm=example_clip,
        sampling_probability=sampling,
        where=where,
        rest_rounds=rest,
        over_select=over_select,
        seed=seed,
    )
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
