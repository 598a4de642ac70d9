"""Waiting at the terminal for the one round of a query or an evaluation."""

from __future__ import annotations

import time

import typer

from aggregator import cli_output as output
from aggregator.client import Client
from aggregator.web.schemas import Campaign, Round

ABORTED = 3
"""Exit code: the round aborted, or the budget refused it."""
POLL_SECONDS = 0.25


def wait(client: Client, campaign_id: str, what: str) -> None:
    """Waits for the end of a campaign of one round; says what happens meanwhile, away from the answer."""
    said = ""
    while True:
        campaign, rounds = client.campaign(campaign_id), client.rounds(campaign_id)
        now = _progress(campaign, rounds[-1] if rounds else None, what)
        if now != said:
            output.hint(now)
            said = now
        if campaign.status not in ("waiting", "running", "paused"):
            return
        time.sleep(POLL_SECONDS)


def nothing_yet(campaign: Campaign, round_: Round | None, what: str) -> None:
    """Says why there is no result; returns only if there may be one later.

    Raises:
        typer.Exit: there will be none.
    """
    if round_ is not None and round_.status == "aborted":
        output.fail(f"{what} aborted: {round_.code}: {round_.detail}")
    elif campaign.status in ("waiting", "running", "paused"):
        output.hint(f"{what} has no result yet: {campaign.note or campaign.status}")
        return
    else:
        output.fail(f"{what} {campaign.status}: {campaign.note}")
    raise typer.Exit(ABORTED)


def _progress(campaign: Campaign, round_: Round | None, what: str) -> str:
    if round_ is None:
        return campaign.note or f"{what} waits for the service"
    if round_.status != "running":
        return f"{what} {round_.status}"
    if not round_.report.phases:
        return f"{len(round_.invited)} devices are asked"
    phase = round_.report.phases[-1]
    return f"{phase.phase}: {phase.answered} of {phase.expected}"
