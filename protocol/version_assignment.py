"""Which version of a model a device is to have: signed, so that nobody else can say so, or say it again.

An assignment is for the whole fleet, or for one device; the latter comes first while it names a version.
Each of the two has a sequence that only rises, also where the version goes down: a device that remembers the
highest sequence that it has taken from each takes no old assignment again. The way down is marked besides,
so that a lower number alone, such as a mistake, brings back nothing.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.errors import MalformedMessage
from protocol.fields import PROTOCOL_VERSION, Schema, Sha256, Slug

ASSIGNMENT_KIND: Final = "version-assignment"


class VersionAssignment(Schema):
    """The payload of the signed document."""

    v: Literal[1] = PROTOCOL_VERSION
    fleet: Slug
    model: Slug
    device: Slug | None = None
    """Whom it is for; None is every device that has no version of its own."""
    version: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """None takes a device's own version away: it is to have what the fleet has."""
    manifest_sha256: Sha256 | None = None
    """Of the version."""
    sequence: Annotated[int, Field(ge=1, le=2**53)]
    rollback: bool = False
    """Whether a device that has a newer version is to go back."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.version is None) != (self.manifest_sha256 is None):
            raise ValueError("a version goes with the digest of its manifest")
        if self.version is None and self.device is None:
            raise ValueError("the fleet's assignment names a version")
        return self

    def to_bytes(self) -> bytes:
        """The JSON that is signed."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parses the payload of a signed document.

        Raises:
            MalformedMessage: it is no assignment of this protocol version.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MalformedMessage(f"not a version assignment: {where}: {first['msg']}"[:200]) from error
