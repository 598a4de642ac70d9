"""`/rollouts` and `/pins`: who has which version."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from aggregator.access.roles import Role
from aggregator.rollout_operations import RolloutRequest
from aggregator.web import rollout_schemas, schemas
from aggregator.web.admission import By, guarded
from aggregator.web.fleet_routes import SLUG
from aggregator.web.model_routes import Model, Number
from aggregator.web.problems import documented
from aggregator.web.round_routes import HEX_ID, Limit, RoundCursor

looking = guarded(Role.VIEWER, tag="rollouts")
acting = guarded(Role.OPERATOR, tag="rollouts")

RolloutId = Annotated[str, Path(pattern=HEX_ID, description="Id of a rollout.")]
OfModel = Annotated[str | None, Query(pattern=SLUG, description="Only of this model.")]


@looking.get("/rollouts", name="list-rollouts")
def list_rollouts(
    by: By, model: OfModel = None, cursor: RoundCursor = None, limit: Limit = 100
) -> schemas.Page[rollout_schemas.Rollout]:
    """Rollouts, newest first."""
    found = list(reversed(by.operator.rollouts(model)))
    ids = [view.record.rollout_id for view in found]
    begin = 0 if cursor is None else ids.index(cursor) + 1 if cursor in ids else len(ids)
    items = tuple(rollout_schemas.Rollout.of(view) for view in found[begin : begin + limit])
    return schemas.Page(items=items, next=items[-1].rollout if len(found) > begin + limit else None)


@acting.post("/rollouts", name="start-rollout", status_code=201, responses=documented("refused", "not-found"))
def start_rollout(by: By, body: RolloutRequest) -> rollout_schemas.Rollout:
    """Begins to bring a version to the fleet, or to a group, wave by wave."""
    return rollout_schemas.Rollout.of(by.to(f"{body.model} {body.version}").start_rollout(body))


@looking.get("/rollouts/{rollout}", name="show-rollout")
def show_rollout(by: By, rollout: RolloutId) -> rollout_schemas.Rollout:
    """One rollout."""
    return rollout_schemas.Rollout.of(by.operator.rollout(rollout))


@looking.get("/rollouts/{rollout}/devices", name="list-rollout-devices")
def list_rollout_devices(by: By, rollout: RolloutId) -> rollout_schemas.RolloutDevices:
    """The devices that a rollout has reached, in the order of its waves, and what that order follows from."""
    return rollout_schemas.RolloutDevices.of(by.operator.rollout(rollout))


@acting.post("/rollouts/{rollout}/pause", name="pause-rollout", responses=documented("refused"))
def pause_rollout(
    by: By, rollout: RolloutId, body: rollout_schemas.Because | None = None
) -> rollout_schemas.Rollout:
    """Lets nothing move until it is resumed, neither forth nor back."""
    return rollout_schemas.Rollout.of(by.operator.turn_rollout(rollout, "pause", _why(body)))


@acting.post("/rollouts/{rollout}/resume", name="resume-rollout", responses=documented("refused"))
def resume_rollout(by: By, rollout: RolloutId) -> rollout_schemas.Rollout:
    """Lets a paused rollout go on."""
    return rollout_schemas.Rollout.of(by.operator.turn_rollout(rollout, "resume"))


@acting.post("/rollouts/{rollout}/halt", name="halt-rollout", responses=documented("refused"))
def halt_rollout(
    by: By, rollout: RolloutId, body: rollout_schemas.Because | None = None
) -> rollout_schemas.Rollout:
    """Ends a rollout where it is: it reaches no more devices, and takes the version from none."""
    return rollout_schemas.Rollout.of(by.operator.turn_rollout(rollout, "halt", _why(body)))


@acting.post("/rollouts/{rollout}/rollback", name="roll-back-rollout", responses=documented("refused"))
def roll_back_rollout(
    by: By, rollout: RolloutId, body: rollout_schemas.Because | None = None
) -> rollout_schemas.Rollout:
    """Takes the version back from every device that it has reached."""
    return rollout_schemas.Rollout.of(by.operator.turn_rollout(rollout, "rollback", _why(body)))


@acting.post(
    "/models/{model}/versions/{version}/withdraw", name="withdraw-version", responses=documented("refused")
)
def withdraw_version(by: By, model: Model, version: Number) -> schemas.Version:
    """Takes a version back for good: devices go back to the newest stable one that is left."""
    return schemas.Version.of(by.operator.withdraw(model, version))


@looking.get("/pins", name="list-pins")
def list_pins(by: By, model: OfModel = None) -> schemas.Page[rollout_schemas.Pin]:
    """Devices and groups that have a version of their own."""
    return schemas.Page(items=tuple(rollout_schemas.Pin.of(pin) for pin in by.operator.pins(model)))


@acting.put("/pins", name="pin-version", responses=documented("refused"))
def pin_version(by: By, body: rollout_schemas.PinRequest) -> rollout_schemas.Pin:
    """Gives a device, or every device with a label, a version that only another pin changes."""
    operator = by.to(f"{body.model} {body.version} {body.device or body.group or ''}")
    return rollout_schemas.Pin.of(
        operator.pin(body.model, body.version, device=body.device, group=body.group)
    )


@acting.post("/pins/remove", name="unpin-version", status_code=204, responses=documented("refused"))
def unpin_version(by: By, body: rollout_schemas.UnpinRequest) -> None:
    """Lets a device, or those with a label, have what the fleet has again."""
    operator = by.to(f"{body.model} {body.device or body.group or ''}")
    operator.unpin(body.model, device=body.device, group=body.group)


def _why(body: rollout_schemas.Because | None) -> str:
    return "by the operator" if body is None else body.reason
