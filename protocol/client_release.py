"""What an operator signs so that devices take a new client: which file it is, and for what system. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from protocol.errors import MalformedMessage
from protocol.fields import PROTOCOL_VERSION, Schema, Sha256, Slug

RELEASE_KIND = "client-release"
"""Kind of the signed document."""
MAX_BUNDLE_BYTES = 2**27

ClientVersion = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}$")]
"""Three numbers, as "0.2.0"."""


class ClientRelease(Schema):
    """A client bundle that devices may install.

    Example:
        release = ClientRelease(version="0.2.0", target="bookworm-arm64", sha256=digest, size=11_500_000)
        document = SignedDocument.create(operator_key, RELEASE_KIND, release.to_bytes())
    """

    type: Literal["covey-client-release"] = "covey-client-release"
    v: Literal[1] = PROTOCOL_VERSION
    version: ClientVersion
    target: Slug
    """System that the bundle is for."""
    sha256: Sha256
    """Of the bundle as a file."""
    size: Annotated[int, Field(ge=1, le=MAX_BUNDLE_BYTES)]
    """Its bytes."""

    def to_bytes(self) -> bytes:
        """The payload to sign."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ClientRelease:
        """Parses a payload whose signature was checked.

        Raises:
            MalformedMessage: it is no release of this format.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise MalformedMessage(f"not a client release: {first['msg']}") from error

    @property
    def order(self) -> tuple[int, ...]:
        """Orders versions by their numbers."""
        return version_order(self.version)


def version_order(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing."""
    return tuple(int(number) for number in version.split("."))
