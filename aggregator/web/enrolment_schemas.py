"""What the API says and takes about tickets and certificates."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from aggregator import records
from aggregator.enrolment_operations import NewTicket
from aggregator.fleet import enrolment
from aggregator.web.schemas import MAX_LABELS, ApiModel, Label, Request
from protocol.enrolment import ApiUrl

MAX_TICKETS = 1000
MAX_TICKET_DAYS = 90


class EnrolmentTokenRequest(Request):
    """Asks for tickets, each of which lets one device in, once.

    Attributes:
        amount: how many.
        name: id of the device; `{n}` counts, past the names that are taken.
        first: where `{n}` starts.
        labels: that the devices get.
        seconds: how long the tickets are valid.
        replaces: the devices take the places of enrolled ones of these names.
        url: of the API as devices reach it; by default `api_url` of the settings.
    """

    amount: Annotated[int, Field(ge=1, le=MAX_TICKETS)] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9{][a-z0-9{}-]{0,62}$")] = "device-{n}"
    first: Annotated[int, Field(ge=0, le=10**9)] = 1
    labels: Annotated[tuple[Label, ...], Field(max_length=MAX_LABELS)] = ()
    seconds: Annotated[float, Field(ge=60, le=MAX_TICKET_DAYS * 86_400)]
    replaces: bool = False
    url: ApiUrl | None = None


class EnrolmentToken(ApiModel):
    """The token of a ticket, without what opens it.

    Attributes:
        name: id of the device that it lets in.
        status: `open` lets a device in; `used` has let one in.
        used_at: seconds since 1970; None while nobody came with it.
        key_id: SHA-256 of the key that came with it.
    """

    token: str
    name: str
    labels: tuple[str, ...]
    replaces: bool
    status: Literal["open", "used", "expired", "revoked"]
    created_at: float
    expires_at: float
    created_by: str
    revoked_at: float | None
    used_at: float | None
    key_id: str | None

    @classmethod
    def of(cls, t: enrolment.EnrolmentToken, now: float) -> Self:
        """From the record, at a time in seconds since 1970."""
        return cls(
            token=t.token_id,
            name=t.name,
            labels=t.labels,
            replaces=t.replaces,
            status=enrolment.status(t, now),
            created_at=t.created_at,
            expires_at=t.expires_at,
            created_by=t.created_by,
            revoked_at=t.revoked_at,
            used_at=t.used_at,
            key_id=t.key_id,
        )


class NewEnrolmentToken(EnrolmentToken):
    """A ticket, in this answer and nowhere else."""

    ticket: Annotated[str, Field(repr=False)]

    @classmethod
    def made(cls, new: NewTicket, now: float) -> Self:
        """From what the operation made."""
        return cls(**dict(EnrolmentToken.of(new.record, now)), ticket=new.ticket.to_text())


class IssuedCertificate(ApiModel):
    """A certificate that a device was given.

    Attributes:
        serial: its number, hexadecimal.
        expires_at: seconds since 1970, as all times.
        revoked_at: None while it is good.
        reason: why it was revoked.
    """

    serial: str
    device: str
    issued_at: float
    expires_at: float
    revoked_at: float | None
    reason: str

    @classmethod
    def of(cls, c: records.IssuedCertificate) -> Self:
        """From the record."""
        return cls(
            serial=c.serial,
            device=c.device_id,
            issued_at=c.issued_at,
            expires_at=c.expires_at,
            revoked_at=c.revoked_at,
            reason=c.reason,
        )
