"""The part of the SQL repository that holds devices and what they last said of themselves.

Every message of a device asks for its state, and every check-in is written down: their statements are built
once, because building one costs more than running it.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, case, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_engine import reason as reason_of
from aggregator.adapters.sql_rollout import failures_from, failures_text
from aggregator.records import ClientCount, Device, DeviceFilter, DeviceState, FleetSize
from aggregator.repository import Conflict, NotFound
from protocol.conditions import Conditions
from protocol.messages import DeviceStatus

_SAID = ("client_version", "runtime", "target", "models", "conditions", "failures")
_OF_DEVICE = s.devices.c.device_id == bindparam("of_device")
_STATE = select(s.devices.c.state).where(_OF_DEVICE)
_GONE = update(s.devices).where(_OF_DEVICE).values({n: bindparam(n) for n in ("online", "last_seen")})
_BORN = _GONE.values({name: bindparam(name) for name in _SAID})


class DeviceReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def device(self, device_id: str) -> Device | None:
        """One enrolled device."""
        query = select(s.devices).where(s.devices.c.device_id == device_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _device(row)

    def device_state(self, device_id: str) -> DeviceState | None:
        """Whether a device may be in the fleet."""
        return self._connection.scalars(_STATE, {"of_device": device_id}).one_or_none()

    def devices(self) -> tuple[Device, ...]:
        """Every enrolled device."""
        query = select(s.devices).order_by(s.devices.c.device_id)
        return tuple(_device(row) for row in self._connection.execute(query))

    def fleet_size(self) -> FleetSize:
        """How many devices there are in the fleet."""
        online, excluded = (
            func.count(case((condition, 1)))
            for condition in (s.devices.c.online, s.devices.c.excluded.is_not(None))
        )
        counts = select(func.count(), online, excluded).where(s.devices.c.state == "active")
        return FleetSize(*self._connection.execute(counts).one())

    def devices_page(self, which: DeviceFilter, *, after: str, limit: int) -> tuple[Device, ...]:
        """Some devices that fit."""
        query = fitting(select(s.devices).where(s.devices.c.device_id > after), which)
        rows = self._connection.execute(query.order_by(s.devices.c.device_id).limit(limit))
        return tuple(_device(row) for row in rows)

    def count_devices(self, which: DeviceFilter) -> int:
        """How many fit."""
        query = fitting(select(func.count()).select_from(s.devices), which)
        return int(self._connection.execute(query).scalar_one())

    def client_counts(self) -> tuple[ClientCount, ...]:
        """How many devices run each version of the client."""
        devices = s.devices.c
        online = func.count(case((devices.online, 1)))
        query = select(devices.client_version, devices.target, func.count(), online)
        groups = query.where(devices.state == "active").group_by(devices.client_version, devices.target)
        rows = self._connection.execute(groups.order_by(devices.client_version, devices.target))
        return tuple(ClientCount(*row) for row in rows)


class DeviceWriter(DeviceReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def add_device(self, device: Device) -> None:
        """Enrols a device."""
        written = {
            "models": json.dumps(dict(device.models)),
            "labels": json.dumps(device.labels),
            "conditions": _written(device.conditions),
            "failures": failures_text(device.failures),
        }
        try:
            self._connection.execute(insert(s.devices).values(**(vars(device) | written)))
        except IntegrityError as error:
            raise Conflict(f"devices: {reason_of(error)}") from error

    def replace_certificate(self, device_id: str, certificate: bytes) -> None:
        """Records a new certificate."""
        self._set(device_id, certificate=certificate)

    def set_exclusion(self, device_id: str, reason: str | None) -> None:
        """Excludes a device from selection, or takes it back in."""
        self._set(device_id, excluded=reason)

    def set_labels(self, device_id: str, labels: tuple[str, ...]) -> None:
        """Replaces the labels of a device."""
        self._set(device_id, labels=json.dumps(labels))

    def note_status(self, device_id: str, status: DeviceStatus, at: float) -> None:
        """Records a birth or a will."""
        values = {"of_device": device_id, "online": status.online, "last_seen": at}
        if not status.online:
            self._connection.execute(_GONE, values)
            return
        said = {
            "client_version": status.client_version,
            "runtime": status.runtime,
            "target": status.target,
            "models": json.dumps(status.models),
            "conditions": _written(status.conditions),
            "failures": failures_text(status.failures),
        }
        self._connection.execute(_BORN, values | said)

    def _set(self, device_id: str, **values: object) -> None:
        changed = self._connection.execute(
            update(s.devices).where(s.devices.c.device_id == device_id).values(**values)
        )
        if changed.rowcount == 0:
            raise NotFound(f"no device {device_id}")


def _written(conditions: Conditions) -> str:
    return conditions.model_dump_json(exclude_none=True)


def _device(row: Row[Any]) -> Device:
    parsed = {
        "models": json.loads(row.models),
        "labels": tuple(json.loads(row.labels)),
        "conditions": Conditions.model_validate_json(row.conditions),
        "failures": failures_from(row.failures),
    }
    return Device(**(row._asdict() | parsed))


def fitting(query: Select[Any], which: DeviceFilter) -> Select[Any]:
    """The query, for the devices that fit."""
    if which.label is not None:
        # Labels hold no quotation mark, so the quoted label is found nowhere else in the list.
        query = query.where(s.devices.c.labels.contains(json.dumps(which.label), autoescape=True))
    if which.online is not None:
        query = query.where(s.devices.c.online == which.online)
    if which.client_version is not None:
        query = query.where(s.devices.c.client_version == which.client_version)
    if which.answers_with is not None:
        model, version = which.answers_with
        item = f"{json.dumps(model)}: {version}"
        models = (s.devices.c.models.contains(item + end, autoescape=True) for end in (",", "}"))
        query = query.where(or_(*models))
    if which.text is not None:
        columns = (s.devices.c.device_id, s.devices.c.labels, s.devices.c.client_version)
        query = query.where(or_(*(column.contains(which.text, autoescape=True) for column in columns)))
    if which.excluded is not None:
        query = query.where(
            s.devices.c.excluded.is_not(None) if which.excluded else s.devices.c.excluded.is_(None)
        )
    return query
