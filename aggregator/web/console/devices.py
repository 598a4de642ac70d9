"""Buttons of devices: each asks first, then does what the API's route of the same name does."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import Form, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import REASON, Field, Turn, ask, ask_turn
from aggregator.web.fleet_routes import DeviceId
from aggregator.web.problems import ApiProblem

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

Reason = Annotated[schemas.Text, Form(min_length=1)]
_LABEL = re.compile(r"[a-z0-9][a-z0-9._=-]{0,62}")
_TURNS = {
    "exclude": Turn(
        "Exclude",
        "It is selected for no round that starts from now on, until somebody includes it again. "
        "It keeps its model, and answers predictions. A round that runs goes on with it.",
        (REASON,),
        danger=True,
        ending="from rounds",
    ),
    "include": Turn("Include", "It may be selected for the next round.", ending="again"),
    "revoke": Turn(
        "Revoke",
        "For a device that is stolen or that lies. The broker ends its connection within seconds and lets it "
        "in no more; a round that runs goes on without it. Only a new ticket lets it in again.",
        (REASON,),
        danger=True,
    ),
    "retire": Turn(
        "Retire",
        "For a device that is broken, sold or put away. The broker lets it in no more. What it contributed "
        "stays in the versions. Only a new ticket lets it in again.",
        danger=True,
    ),
}


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


@asking.get("/fleet/{device}/{turn}", name="ask-turn-device", response_class=HTMLResponse)
def ask_turn_device(
    by: By,
    request: Request,
    device: DeviceId,
    turn: Annotated[Literal["exclude", "include", "revoke", "retire"], Path()],
) -> Response:
    """Asks before a device takes a turn."""
    found = by.operator.device(device)
    why = f"It was excluded for this: {found.excluded or 'it is not'}." if turn == "include" else ""
    return ask_turn(request, by, _TURNS[turn], device, f"/fleet/{device}", why)


@acting.post("/fleet/{device}/exclude", name="exclude-device")
def exclude(by: By, device: DeviceId, reason: Reason) -> Response:
    """Keeps a device out of future rounds."""
    by.operator.exclude(device, reason)
    return RedirectResponse(f"/fleet/{device}", 303)


@acting.post("/fleet/{device}/include", name="include-device")
def include(by: By, device: DeviceId) -> Response:
    """Lets an excluded device take part again."""
    by.operator.exclude(device, None)
    return RedirectResponse(f"/fleet/{device}", 303)


@acting.post("/fleet/{device}/revoke", name="revoke-device")
def revoke(by: By, device: DeviceId, reason: Reason) -> Response:
    """Takes a device's right to be in the fleet."""
    by.operator.revoke(device, reason)
    return RedirectResponse(f"/fleet/{device}", 303)


@acting.post("/fleet/{device}/retire", name="retire-device")
def retire(by: By, device: DeviceId) -> Response:
    """Ends a device's time in the fleet."""
    by.operator.retire(device)
    return RedirectResponse(f"/fleet/{device}", 303)
