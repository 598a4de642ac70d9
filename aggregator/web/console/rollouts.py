"""Buttons of rollouts and versions: each asks first, then does what the API's route of the same name does."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.rollout_operations import RolloutRequest
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import REASON, Field, Turn, ask, ask_turn
from aggregator.web.model_routes import Model, Number
from aggregator.web.problems import ApiProblem
from aggregator.web.rollout_routes import RolloutId

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

Reason = Annotated[schemas.Text, Form(min_length=1)]
_TURNS = {
    "pause": Turn("Pause", "Nothing moves until it is resumed, neither forth nor back.", (REASON,)),
    "resume": Turn("Resume", "It goes on with its present wave, and reaches more devices as its gates hold."),
    "halt": Turn("Halt", "It reaches no more devices, and takes the version from none.", (REASON,)),
    "rollback": Turn(
        "Roll back",
        "Every device that it has reached goes back to the version it had before.",
        (REASON,),
        danger=True,
    ),
}


@asking.get("/models/{model}/{version}/roll-out", name="ask-start-rollout", response_class=HTMLResponse)
def ask_start(by: By, request: Request, model: Model, version: Number) -> Response:
    """Asks how to bring a version to the fleet."""
    by.operator.version(model, version)
    return ask(
        request,
        by,
        f"Roll out {model} {version}?",
        "It reaches the devices in waves; the next wave begins when every gate holds. A failed gate halts it "
        "and takes the version back by itself.",
        fields=(
            Field("percent", "Percent of the devices in each wave", "5,25,100", required=True),
            Field("gate", "Gates, with spaces between", "errors<0.01"),
            Field("group", "Only devices with this label (empty: the fleet)"),
        ),
        button="Roll out",
        back="/models",
    )


@acting.post("/models/{model}/{version}/roll-out", name="start-rollout")
def start(
    by: By,
    model: Model,
    version: Number,
    percent: Annotated[str, Form(max_length=100)],
    gate: Annotated[str, Form(max_length=400)] = "",
    group: Annotated[str, Form(max_length=63)] = "",
) -> Response:
    """Begins to bring a version to the fleet, or to a group, wave by wave."""
    try:
        percents = tuple(float(part) for part in percent.split(","))
    except ValueError as error:
        raise ApiProblem(
            "invalid-request", "percent: numbers with commas between, such as 5,25,100"
        ) from error
    request = RolloutRequest(model, version, percents, tuple(gate.split()), group=group.strip() or None)
    by.to(f"{model} {version}").start_rollout(request)
    return RedirectResponse("/rollouts", 303)


@asking.get("/models/{model}/{version}/withdraw", name="ask-withdraw-version", response_class=HTMLResponse)
def ask_withdraw(by: By, request: Request, model: Model, version: Number) -> Response:
    """Asks before a version is withdrawn."""
    by.operator.version(model, version)
    return ask(
        request,
        by,
        f"Withdraw {model} {version} for good?",
        "Devices go back to the newest stable version that is left, and no round begins with this one. "
        "Nothing brings a withdrawn version back.",
        button="Withdraw",
        danger=True,
        back="/models",
    )


@acting.post("/models/{model}/{version}/withdraw", name="withdraw-version")
def withdraw(by: By, model: Model, version: Number) -> Response:
    """Takes a version back for good."""
    by.operator.withdraw(model, version)
    return RedirectResponse("/models", 303)


@asking.get("/rollouts/{rollout}/{turn}", name="ask-turn-rollout", response_class=HTMLResponse)
def ask_turn_rollout(
    by: By,
    request: Request,
    rollout: RolloutId,
    turn: Annotated[Literal["pause", "resume", "halt", "rollback"], Path()],
) -> Response:
    """Asks before a rollout takes a turn."""
    found = by.operator.rollout(rollout).record
    return ask_turn(request, by, _TURNS[turn], f"{found.model} {found.version}", "/rollouts")


@acting.post("/rollouts/{rollout}/pause", name="pause-rollout")
def pause(by: By, rollout: RolloutId, reason: Reason) -> Response:
    """Lets nothing move until it is resumed."""
    by.operator.turn_rollout(rollout, "pause", reason)
    return RedirectResponse("/rollouts", 303)


@acting.post("/rollouts/{rollout}/resume", name="resume-rollout")
def resume(by: By, rollout: RolloutId) -> Response:
    """Lets a paused rollout go on."""
    by.operator.turn_rollout(rollout, "resume")
    return RedirectResponse("/rollouts", 303)


@acting.post("/rollouts/{rollout}/halt", name="halt-rollout")
def halt(by: By, rollout: RolloutId, reason: Reason) -> Response:
    """Ends a rollout where it is."""
    by.operator.turn_rollout(rollout, "halt", reason)
    return RedirectResponse("/rollouts", 303)


@acting.post("/rollouts/{rollout}/rollback", name="roll-back-rollout")
def roll_back(by: By, rollout: RolloutId, reason: Reason) -> Response:
    """Takes the version back from every device that it has reached."""
    by.operator.turn_rollout(rollout, "rollback", reason)
    return RedirectResponse("/rollouts", 303)
