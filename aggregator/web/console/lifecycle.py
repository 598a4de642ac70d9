"""Buttons about devices that leave the fleet."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import REASON, ask
from aggregator.web.fleet_routes import DeviceId

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")


@asking.get("/fleet/{device}/revoke", name="ask-revoke-device", response_class=HTMLResponse)
def ask_revoke(by: By, request: Request, device: DeviceId) -> Response:
    """Asks before a device is revoked."""
    by.operator.device(device)
    return ask(
        request,
        by,
        f"Revoke {device}?",
        "For a device that is stolen or that lies. The broker ends its connection within seconds and lets it "
        "in no more; a round that runs goes on without it. Only a new ticket lets it in again.",
        fields=(REASON,),
        button="Revoke",
        danger=True,
        back=f"/fleet/{device}",
    )


@acting.post("/fleet/{device}/revoke", name="revoke-device")
def revoke(by: By, device: DeviceId, reason: Annotated[schemas.Text, Form(min_length=1)]) -> Response:
    """Takes a device's right to be in the fleet."""
    by.operator.revoke(device, reason)
    return RedirectResponse(f"/fleet/{device}", 303)


@asking.get("/fleet/{device}/retire", name="ask-retire-device", response_class=HTMLResponse)
def ask_retire(by: By, request: Request, device: DeviceId) -> Response:
    """Asks before a device is retired."""
    by.operator.device(device)
    return ask(
        request,
        by,
        f"Retire {device}?",
        "For a device that is broken, sold or put away. The broker lets it in no more. What it contributed "
        "stays in the versions. Only a new ticket lets it in again.",
        button="Retire",
        danger=True,
        back=f"/fleet/{device}",
    )


@acting.post("/fleet/{device}/retire", name="retire-device")
def retire(by: By, device: DeviceId) -> Response:
    """Ends a device's time in the fleet."""
    by.operator.retire(device)
    return RedirectResponse(f"/fleet/{device}", 303)
