"""Buttons: each asks first, then does what the API's route of the same name does."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import Form, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.settings import CampaignRequest
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import REASON, Field, ask
from aggregator.web.fleet_routes import SLUG, DeviceId
from aggregator.web.problems import ApiProblem
from aggregator.web.round_routes import CampaignId
from protocol.dp.parameters import PrivacyMode

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

_LABEL = re.compile(r"[a-z0-9][a-z0-9._=-]{0,62}")
_MODES = [mode.value for mode in PrivacyMode if mode is not PrivacyMode.EXAMPLE]


# --- devices


@asking.get("/fleet/{device}/exclude", name="ask-exclude-device", response_class=HTMLResponse)
def ask_exclude(by: By, request: Request, device: DeviceId) -> Response:
    """Asks before a device is excluded."""
    by.operator.device(device)
    return ask(
        request,
        by,
        f"Exclude {device} from rounds?",
        "It is selected for no round that starts from now on, until somebody includes it again. "
        "It keeps its model, and answers predictions. A round that runs goes on with it.",
        fields=(REASON,),
        button="Exclude",
        danger=True,
        back=f"/fleet/{device}",
    )


@acting.post("/fleet/{device}/exclude", name="exclude-device")
def exclude(by: By, device: DeviceId, reason: Annotated[schemas.Text, Form(min_length=1)]) -> Response:
    """Keeps a device out of future rounds."""
    by.operator.exclude(device, reason)
    return RedirectResponse(f"/fleet/{device}", 303)


@asking.get("/fleet/{device}/include", name="ask-include-device", response_class=HTMLResponse)
def ask_include(by: By, request: Request, device: DeviceId) -> Response:
    """Asks before a device is included."""
    found = by.operator.device(device)
    return ask(
        request,
        by,
        f"Include {device} again?",
        f"It may be selected for the next round. It was excluded for this: {found.excluded or 'it is not'}.",
        button="Include",
        back=f"/fleet/{device}",
    )


@acting.post("/fleet/{device}/include", name="include-device")
def include(by: By, device: DeviceId) -> Response:
    """Lets an excluded device take part again."""
    by.operator.exclude(device, None)
    return RedirectResponse(f"/fleet/{device}", 303)


@asking.get("/fleet/{device}/label", name="ask-label-device", response_class=HTMLResponse)
def ask_label(by: By, request: Request, device: DeviceId) -> Response:
    """Asks for the labels of a device."""
    found = by.operator.device(device)
    return ask(
        request,
        by,
        f"Labels of {device}",
        "All labels that it is to have, with spaces between: barn site=north. Those that you leave out go.",
        fields=(Field("labels", "Labels", " ".join(found.labels)),),
        button="Save",
        back=f"/fleet/{device}",
    )


@acting.post("/fleet/{device}/label", name="label-device")
def label(by: By, device: DeviceId, labels: Annotated[str, Form(max_length=2400)] = "") -> Response:
    """Replaces the labels of a device."""
    given = labels.split()
    if len(given) > schemas.MAX_LABELS or not all(_LABEL.fullmatch(each) for each in given):
        raise ApiProblem(
            "invalid-request",
            f"a label has lower-case letters, digits and . _ = -, at most 63, and a device at most "
            f"{schemas.MAX_LABELS} of them",
        )
    by.operator.label(device, given)
    return RedirectResponse(f"/fleet/{device}", 303)


# --- campaigns


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


_TURNS = {
    "pause": ("Pause", "No more rounds of it begin until it is resumed; a round that runs goes to its end."),
    "resume": ("Resume", "Its rounds go on; with a schedule, from the next time that it names."),
    "cancel": ("Cancel", "It ends for good, and a round of it that runs is aborted."),
}


@asking.get("/campaigns/{campaign}/{turn}", name="ask-turn-campaign", response_class=HTMLResponse)
def ask_turn(
    by: By,
    request: Request,
    campaign: CampaignId,
    turn: Annotated[Literal["pause", "resume", "cancel"], Path()],
) -> Response:
    """Asks before a campaign is turned."""
    found = by.operator.campaign(campaign)
    verb, consequence = _TURNS[turn]
    what = f"campaign {campaign[:8]} of {found.model or 'a query'}"
    danger, back = turn == "cancel", "/campaigns"
    button = f"{verb} the campaign"
    return ask(request, by, f"{verb} {what}?", consequence, button=button, danger=danger, back=back)


@acting.post("/campaigns/{campaign}/pause", name="pause-campaign")
def pause(by: By, campaign: CampaignId) -> Response:
    """Begins no more rounds until it is resumed."""
    by.operator.pause_campaign(campaign)
    return RedirectResponse("/campaigns", 303)


@acting.post("/campaigns/{campaign}/resume", name="resume-campaign")
def resume(by: By, campaign: CampaignId) -> Response:
    """Goes on with a paused campaign."""
    by.operator.resume_campaign(campaign)
    return RedirectResponse("/campaigns", 303)


@acting.post("/campaigns/{campaign}/cancel", name="cancel-campaign")
def cancel(by: By, campaign: CampaignId) -> Response:
    """Ends a campaign for good."""
    by.operator.cancel_campaign(campaign)
    return RedirectResponse("/campaigns", 303)
