"""`/devices`: the fleet."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import Annotated

from fastapi import Path, Query, Request, Response

from aggregator.access.roles import Role
from aggregator.fleet.authority import requested_name
from aggregator.records import DeviceFilter
from aggregator.web import enrolment_schemas, schemas
from aggregator.web.admission import By, guarded
from aggregator.web.context import context_of
from aggregator.web.problems import ApiProblem, documented
from protocol.enrolment import EnrolmentBundle

looking = guarded(Role.VIEWER, tag="fleet")
acting = guarded(Role.OPERATOR, tag="fleet")

SLUG = r"^[a-z0-9][a-z0-9-]{0,62}$"
DeviceId = Annotated[str, Path(pattern=SLUG, description="Id of a device.")]


@looking.get("/devices", name="list-devices")
def list_devices(
    by: By,
    label: Annotated[schemas.Label | None, Query(description="It carries this label.")] = None,
    online: Annotated[bool | None, Query(description="It is online, or is not.")] = None,
    client_version: Annotated[
        str | None, Query(max_length=40, pattern=schemas.PRINTABLE, description="Of Covey on it.")
    ] = None,
    answers_with: Annotated[
        str | None,
        Query(
            pattern=SLUG[:-1] + r":[1-9][0-9]{0,9}$", description="`watch:3`: it answers with this version."
        ),
    ] = None,
    cursor: Annotated[
        str, Query(pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$", description="From a page before.")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=schemas.MAX_PAGE)] = 100,
) -> schemas.Page[schemas.Device]:
    """The devices that fit, by id."""
    model, _, version = (answers_with or "").partition(":")
    which = DeviceFilter(
        label=label,
        online=online,
        client_version=client_version,
        answers_with=(model, int(version)) if answers_with else None,
    )
    found = by.operator.devices_page(which, after=cursor, limit=limit + 1)
    items = tuple(schemas.Device.of(device) for device in found[:limit])
    return schemas.Page(items=items, next=items[-1].device if len(found) > limit else None)


@looking.get("/devices/{device}", name="show-device")
def show_device(by: By, device: DeviceId) -> schemas.Device:
    """One device."""
    return schemas.Device.of(by.operator.device(device))


@looking.get("/devices/{device}/certificates", name="list-certificates")
def list_certificates(by: By, device: DeviceId) -> schemas.Page[enrolment_schemas.IssuedCertificate]:
    """The certificates that a device was given, oldest first."""
    found = by.operator.certificates(device)
    return schemas.Page(items=tuple(enrolment_schemas.IssuedCertificate.of(each) for each in found))


@acting.post(
    "/devices",
    name="enrol-device",
    status_code=201,
    responses=documented("enrolment-refused", "enrolment-closed", "conflict"),
)
def enrol_device(by: By, request: Request, body: schemas.EnrolRequest) -> EnrolmentBundle:
    """Issues a device's certificate; answers with the bundle that the device needs, which holds no secret."""
    try:
        csr = base64.b64decode(body.csr, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiProblem("invalid-request", "body.csr: not base64") from error
    operator = by.to(body.name or requested_name(csr))
    # The CA's key is read for this one certificate: what faces the network keeps none.
    return replace(operator, authority=context_of(request).enrolling()).enrol(csr, name=body.name)


@acting.put("/devices/{device}/exclusion", name="exclude-device", status_code=204)
def exclude_device(by: By, device: DeviceId, body: schemas.Exclusion) -> Response:
    """Keeps a device out of future rounds."""
    by.operator.exclude(device, body.reason)
    return Response(status_code=204)


@acting.delete("/devices/{device}/exclusion", name="include-device", status_code=204)
def include_device(by: By, device: DeviceId) -> Response:
    """Lets an excluded device take part again."""
    by.operator.exclude(device, None)
    return Response(status_code=204)


@acting.put("/devices/{device}/labels", name="label-device")
def label_device(by: By, device: DeviceId, body: schemas.Labels) -> schemas.Device:
    """Replaces the labels of a device."""
    return schemas.Device.of(by.operator.label(device, body.labels))
