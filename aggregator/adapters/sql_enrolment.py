"""The part of the SQL repository that holds enrolment tokens and issued certificates."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, case, insert, select, update
from sqlalchemy.exc import IntegrityError

from aggregator.adapters import sql_schema as s
from aggregator.fleet.enrolment import EnrolmentToken
from aggregator.records import DeviceState, IssuedCertificate
from aggregator.repository import Conflict, NotFound


class EnrolmentReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def certificates(
        self, device_id: str | None = None, *, revoked: bool | None = None
    ) -> tuple[IssuedCertificate, ...]:
        """Certificates that were issued."""
        table = s.certificates
        query = select(table).order_by(table.c.issued_at, table.c.serial)
        if device_id is not None:
            query = query.where(table.c.device_id == device_id)
        if revoked is not None:
            query = query.where(table.c.revoked_at.is_not(None) if revoked else table.c.revoked_at.is_(None))
        return tuple(IssuedCertificate(**row._asdict()) for row in self._connection.execute(query))

    def active_devices(self) -> frozenset[str]:
        """Devices that may connect."""
        query = select(s.devices.c.device_id).where(s.devices.c.state == "active")
        return frozenset(self._connection.scalars(query))

    def enrolment_token(self, token_id: str) -> EnrolmentToken | None:
        """One token."""
        table = s.enrolment_tokens
        row = self._connection.execute(select(table).where(table.c.token_id == token_id)).one_or_none()
        return None if row is None else _token(row)

    def enrolment_tokens(self) -> tuple[EnrolmentToken, ...]:
        """Every token."""
        query = select(s.enrolment_tokens).order_by(s.enrolment_tokens.c.seq)
        return tuple(_token(row) for row in self._connection.execute(query))


class EnrolmentWriter(EnrolmentReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def note_enrolment(self, device_id: str, token_id: str | None, at: float) -> None:
        """Records that a known device was enrolled anew."""
        self._of_device(device_id, state="active", token_id=token_id, enrolled_at=at)

    def set_device_state(self, device_id: str, state: DeviceState) -> None:
        """Says whether a device may be in the fleet."""
        self._of_device(device_id, state=state)

    def add_certificate(self, certificate: IssuedCertificate) -> None:
        """Records a certificate."""
        try:
            self._connection.execute(insert(s.certificates).values(**vars(certificate)))
        except IntegrityError as error:
            raise Conflict(f"certificates: {error.orig}") from error

    def revoke_certificate(self, serial: str, at: float, reason: str) -> None:
        """Revokes a certificate."""
        table = s.certificates
        good = table.c.revoked_at.is_(None)
        statement = update(table).where(table.c.serial == serial)
        first = {
            "revoked_at": case((good, at), else_=table.c.revoked_at),
            "reason": case((good, reason), else_=table.c.reason),
        }
        if self._connection.execute(statement.values(**first)).rowcount == 0:
            raise NotFound(f"no certificate with the serial number {serial}")

    def add_enrolment_token(self, token: EnrolmentToken) -> None:
        """Adds a token."""
        try:
            values = vars(token) | {"labels": json.dumps(token.labels)}
            self._connection.execute(insert(s.enrolment_tokens).values(**values))
        except IntegrityError as error:
            raise Conflict(f"enrolment_tokens: {error.orig}") from error

    def use_enrolment_token(self, token_id: str, key_id: str, at: float) -> None:
        """Records that a key was enrolled by a token."""
        table = s.enrolment_tokens
        statement = update(table).where(table.c.token_id == token_id, table.c.used_at.is_(None))
        if self._connection.execute(statement.values(used_at=at, key_id=key_id)).rowcount == 0:
            raise NotFound(f"no unused enrolment token {token_id}")

    def revoke_enrolment_token(self, token_id: str, at: float) -> None:
        """Revokes a token."""
        table = s.enrolment_tokens
        statement = update(table).where(table.c.token_id == token_id)
        first = case((table.c.revoked_at.is_(None), at), else_=table.c.revoked_at)
        if self._connection.execute(statement.values(revoked_at=first)).rowcount == 0:
            raise NotFound(f"no enrolment token {token_id}")

    def _of_device(self, device_id: str, **values: object) -> None:
        statement = update(s.devices).where(s.devices.c.device_id == device_id)
        if self._connection.execute(statement.values(**values)).rowcount == 0:
            raise NotFound(f"no device {device_id}")


def _token(row: Any) -> EnrolmentToken:
    values = {name: value for name, value in row._asdict().items() if name != "seq"}
    return EnrolmentToken(**(values | {"labels": tuple(json.loads(values["labels"]))}))
