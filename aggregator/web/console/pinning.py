"""Buttons of pins: each asks first, then does what the API's route of the same name does."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import Field, ask
from aggregator.web.fleet_routes import SLUG

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

Kind = Literal["device", "group"]
Name = Annotated[str, Form(pattern=SLUG)]
Target = Annotated[str, Form(min_length=1, max_length=63)]


@asking.get("/pins/new", name="ask-pin-version", response_class=HTMLResponse)
def ask_pin(by: By, request: Request) -> Response:
    """Asks which version to pin for whom."""
    models = tuple(dict.fromkeys(version.model for version in by.operator.versions()))
    return ask(
        request,
        by,
        "Pin a version",
        "A device, or every device with a label, has this version from now on, whatever rollouts bring, "
        "until the pin is removed. A device's own pin comes before its label's.",
        action="/pins",
        fields=(
            Field("model", "Model", choices=models),
            Field("version", "Version", kind="number", required=True),
            Field("kind", "For", "device", choices=("device", "group")),
            Field("target", "Name of the device, or label of the group", required=True),
        ),
        button="Pin",
        back="/rollouts",
    )


@acting.post("/pins", name="pin-version")
def pin(
    by: By,
    model: Name,
    version: Annotated[int, Form(ge=1, le=2**31)],
    kind: Annotated[Kind, Form()],
    target: Target,
) -> Response:
    """Gives a device, or every device with a label, a version that only another pin changes."""
    by.to(f"{model} {version} {target}").pin(model, version, **{kind: target.strip()})
    return RedirectResponse("/rollouts", 303)


@asking.get("/pins/remove", name="ask-unpin-version", response_class=HTMLResponse)
def ask_unpin(
    by: By,
    request: Request,
    model: Annotated[str, Query(pattern=SLUG)],
    kind: Annotated[Kind, Query()],
    target: Annotated[str, Query(min_length=1, max_length=63)],
) -> Response:
    """Asks before a pin is removed."""
    return ask(
        request,
        by,
        f"Remove the pin of {model} for {target}?",
        "It has what the fleet has again, at once: that may be a newer version or an older one.",
        action="/pins/remove",
        fields=(
            Field("model", "Model", choices=(model,)),
            Field("kind", "For", choices=(kind,)),
            Field("target", "Name or label", choices=(target,)),
        ),
        button="Remove the pin",
        danger=True,
        back="/rollouts",
    )


@acting.post("/pins/remove", name="unpin-version")
def unpin(by: By, model: Name, kind: Annotated[Kind, Form()], target: Target) -> Response:
    """Lets a device, or those with a label, have what the fleet has again."""
    by.to(f"{model} {target}").unpin(model, **{kind: target})
    return RedirectResponse("/rollouts", 303)
