"""The part of the SQL repository that says who has which version: stages, pins, assignments and rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from aggregator.adapters import sql_schema as s
from aggregator.records import Assigned, Pin, Rollout, Stage
from aggregator.repository import Conflict, NotFound
from protocol.messages import VersionFailure

_FAILURES: TypeAdapter[dict[str, VersionFailure]] = TypeAdapter(dict[str, VersionFailure])


def failures_text(failures: Mapping[str, VersionFailure]) -> str:
    """The JSON of a device's failures."""
    return _FAILURES.dump_json(dict(failures)).decode()


def failures_from(text: str) -> dict[str, VersionFailure]:
    """Parses `failures_text`."""
    return _FAILURES.validate_json(text)


class RolloutReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def pins(self, model: str | None = None) -> tuple[Pin, ...]:
        """Pins, by model, kind and target."""
        query = select(s.pins).order_by(s.pins.c.model, s.pins.c.kind, s.pins.c.target)
        if model is not None:
            query = query.where(s.pins.c.model == model)
        return tuple(Pin(**row._asdict()) for row in self._connection.execute(query))

    def assigned(self, model: str, device_id: str = "") -> Assigned | None:
        """What one audience was last told."""
        query = select(s.assigned).where(s.assigned.c.model == model, s.assigned.c.device_id == device_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else Assigned(**row._asdict())

    def assigned_devices(self, model: str, *, of_its_own: bool = False) -> tuple[Assigned, ...]:
        """What each device was last told by itself."""
        query = select(s.assigned).where(s.assigned.c.model == model, s.assigned.c.device_id != "")
        if of_its_own:
            query = query.where(s.assigned.c.version.is_not(None))
        rows = self._connection.execute(query.order_by(s.assigned.c.device_id))
        return tuple(Assigned(**row._asdict()) for row in rows)

    def rollout(self, rollout_id: str) -> Rollout | None:
        """One rollout."""
        query = select(s.rollouts).where(s.rollouts.c.rollout_id == rollout_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _rollout(row)

    def rollouts(self, *statuses: str) -> tuple[Rollout, ...]:
        """Rollouts, oldest first."""
        query = select(s.rollouts).order_by(s.rollouts.c.seq)
        if statuses:
            query = query.where(s.rollouts.c.status.in_(statuses))
        return tuple(_rollout(row) for row in self._connection.execute(query))


class RolloutWriter(RolloutReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def set_stage(self, model: str, version: int, stage: Stage) -> None:
        """Changes the stage of a version."""
        table = s.versions
        statement = update(table).where(table.c.model == model, table.c.version == version)
        if self._connection.execute(statement.values(stage=stage)).rowcount == 0:
            raise NotFound(f"no {model} version {version}")

    def set_pin(self, pin: Pin) -> None:
        """Adds or replaces a pin."""
        self._connection.execute(_of_pin(pin.model, pin.kind, pin.target))
        self._connection.execute(insert(s.pins).values(**vars(pin)))

    def drop_pin(self, model: str, kind: str, target: str) -> None:
        """Removes a pin."""
        if self._connection.execute(_of_pin(model, kind, target)).rowcount == 0:
            raise NotFound(f"no pin of {model} for {target}")

    def assign(self, assigned: Assigned) -> None:
        """Adds an assignment, or replaces one of a lower sequence."""
        before = self.assigned(assigned.model, assigned.device_id)
        if before is None:
            self._connection.execute(insert(s.assigned).values(**vars(assigned)))
            return
        if assigned.sequence <= before.sequence:
            raise Conflict(f"the assignment {assigned.sequence} is not newer than {before.sequence}")
        table = s.assigned
        statement = update(table).where(
            table.c.model == assigned.model, table.c.device_id == assigned.device_id
        )
        self._connection.execute(statement.values(**vars(assigned)))

    def add_rollout(self, rollout: Rollout) -> None:
        """Adds a rollout."""
        values = vars(rollout) | {"pool": json.dumps(rollout.pool)}
        try:
            self._connection.execute(insert(s.rollouts).values(**values))
        except IntegrityError as error:
            raise Conflict(f"rollouts: {error.orig}") from error

    def update_rollout(self, rollout_id: str, status: str, progress: bytes) -> None:
        """Changes where a rollout is."""
        statement = update(s.rollouts).where(s.rollouts.c.rollout_id == rollout_id)
        if self._connection.execute(statement.values(status=status, progress=progress)).rowcount == 0:
            raise NotFound(f"no rollout {rollout_id}")


def _of_pin(model: str, kind: str, target: str) -> Any:
    table = s.pins
    return delete(table).where(table.c.model == model, table.c.kind == kind, table.c.target == target)


def _rollout(row: Any) -> Rollout:
    values = {name: value for name, value in row._asdict().items() if name != "seq"}
    return Rollout(**(values | {"pool": tuple(json.loads(row.pool))}))
