"""Buttons of campaigns: each asks first, then does what the API's route of the same name does."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.records import Campaign
from aggregator.settings import CampaignRequest
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import Field, Turn, ask, ask_turn
from aggregator.web.fleet_routes import SLUG
from aggregator.web.problems import ApiProblem
from aggregator.web.round_routes import CampaignId
from protocol.dp.parameters import PrivacyMode

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

_TURNS = {
    "pause": Turn(
        "Pause",
        "No more rounds of it begin until it is resumed; a round that runs goes to its end.",
        button="Pause the campaign",
    ),
    "resume": Turn(
        "Resume",
        "Its rounds go on; with a schedule, from the next time that it names.",
        button="Resume the campaign",
    ),
    "cancel": Turn(
        "Cancel",
        "It ends for good, and a round of it that runs is aborted, unless its devices were asked to unmask.",
        button="Cancel the campaign",
        danger=True,
    ),
}
_CANCEL_QUERY = Turn(
    "Cancel",
    "Nobody is asked any more. One whose devices were asked to unmask goes to its end: its privacy is spent.",
    button="Cancel the query",
    danger=True,
)
_MODES = [mode.value for mode in PrivacyMode if mode is not PrivacyMode.EXAMPLE]


@asking.get("/campaigns/new", name="ask-start-campaign", response_class=HTMLResponse)
def ask_start(by: By, request: Request) -> Response:
    """Asks what rounds to run."""
    models = tuple(dict.fromkeys(version.model for version in by.operator.versions()))
    return ask(
        request,
        by,
        "Start rounds",
        "The service runs them one after the other, as soon as enough devices are online. Rounds with noise "
        "spend privacy, which nothing gives back. `covey round start --help` has every other setting.",
        action="/campaigns",
        fields=(
            Field("model", "Model", choices=models),
            Field("rounds", "Rounds", "10", kind="number", required=True),
            Field("cohort", "Devices in a cohort", "10", kind="number", required=True),
            Field("privacy", "Who adds noise", PrivacyMode.DISTRIBUTED, choices=tuple(_MODES)),
            Field(
                "epsilon_limit", "Stop before epsilon exceeds (empty: no limit)", kind="number", step="any"
            ),
        ),
        button="Start",
        back="/campaigns",
    )


@acting.post("/campaigns", name="start-campaign")
def start(
    by: By,
    model: Annotated[str, Form(pattern=SLUG)],
    rounds: Annotated[int, Form(ge=1, le=10_000)],
    cohort: Annotated[int, Form(ge=1, le=100_000)],
    privacy: Annotated[PrivacyMode, Form()],
    epsilon_limit: Annotated[str, Form(max_length=20, pattern=r"^[0-9.]*$")] = "",
) -> Response:
    """Asks for rounds of training."""
    try:
        limit = float(epsilon_limit) if epsilon_limit else None
    except ValueError as error:
        raise ApiProblem("invalid-request", "epsilon_limit: not a number") from error
    by.to(model).start_rounds(
        CampaignRequest(model=model, rounds=rounds, cohort=cohort, privacy=privacy, epsilon_limit=limit)
    )
    return RedirectResponse("/campaigns", 303)


@asking.get("/campaigns/{campaign}/{turn}", name="ask-turn-campaign", response_class=HTMLResponse)
def ask_turn_campaign(
    by: By,
    request: Request,
    campaign: CampaignId,
    turn: Annotated[Literal["pause", "resume", "cancel"], Path()],
) -> Response:
    """Asks before a campaign takes a turn."""
    found = by.operator.campaign(campaign)
    asks = _TURNS[turn] if found.model is not None or turn != "cancel" else _CANCEL_QUERY
    what = f"query {campaign[:8]}" if found.model is None else f"campaign {campaign[:8]} of {found.model}"
    return ask_turn(request, by, asks, what, _page_of(found))


@acting.post("/campaigns/{campaign}/pause", name="pause-campaign")
def pause(by: By, campaign: CampaignId) -> Response:
    """Begins no more rounds until it is resumed."""
    return RedirectResponse(_page_of(by.operator.pause_campaign(campaign)), 303)


@acting.post("/campaigns/{campaign}/resume", name="resume-campaign")
def resume(by: By, campaign: CampaignId) -> Response:
    """Goes on with a paused campaign."""
    return RedirectResponse(_page_of(by.operator.resume_campaign(campaign)), 303)


@acting.post("/campaigns/{campaign}/cancel", name="cancel-campaign")
def cancel(by: By, campaign: CampaignId) -> Response:
    """Ends a campaign for good."""
    return RedirectResponse(_page_of(by.operator.cancel_campaign(campaign)), 303)


def _page_of(campaign: Campaign) -> str:
    return "/queries" if campaign.model is None else "/campaigns"
