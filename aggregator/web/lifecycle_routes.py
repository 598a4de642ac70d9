"""`/devices/{device}/revocation`, `/retirement`, `/place`: devices that leave the fleet, or move."""

from __future__ import annotations

from aggregator.access.roles import Role
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.fleet_routes import DeviceId
from aggregator.web.problems import documented

acting = guarded(Role.OPERATOR, tag="fleet")


@acting.put("/devices/{device}/revocation", name="revoke-device", responses=documented("refused"))
def revoke_device(by: By, device: DeviceId, body: schemas.Exclusion) -> schemas.Device:
    """Takes a device's right to be in the fleet; the broker ends its connection within seconds."""
    return schemas.Device.of(by.operator.revoke(device, body.reason))


@acting.put("/devices/{device}/retirement", name="retire-device", responses=documented("refused"))
def retire_device(by: By, device: DeviceId) -> schemas.Device:
    """Ends a device's time in the fleet."""
    return schemas.Device.of(by.operator.retire(device))


@acting.post("/devices/{device}/place", name="move-device", responses=documented("refused"))
def move_device(by: By, device: DeviceId, body: schemas.Labels) -> schemas.Device:
    """Gives a device labels: one with a value takes the place of the same with another value."""
    return schemas.Device.of(by.operator.move(device, body.labels))
