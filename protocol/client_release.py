"""What an operator signs so that devices take a new client: which files it is, and for what systems. Pure.

Which device is to have which release is said as for models: by version assignments of the name `CLIENT`,
whose version is the release's number.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.errors import MalformedMessage
from protocol.fields import PROTOCOL_VERSION, BlobRef, Schema, Sha256, Slug

RELEASE_KIND: Final = "client-release"
"""Kind of the signed document."""
CLIENT: Final = "covey-client"
"""What assignments, rollouts and statuses call the client; no model has this name."""
MAX_BUNDLE_BYTES = 2**27
MAX_BUNDLES = 8
MAX_RELEASE_BYTES = 131_072
"""Of the signed document, as a file."""

_PART = 1000
ClientVersion = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){2}$")]
"""Three numbers, as "0.2.0"."""


class ClientBundle(Schema):
    """The file that one system installs."""

    target: Slug
    """System that it is for, as `bookworm-arm64`."""
    sha256: Sha256
    size: Annotated[int, Field(ge=1, le=MAX_BUNDLE_BYTES)]
    """Its bytes."""

    @property
    def blob(self) -> BlobRef:
        """What a transfer calls it."""
        return BlobRef(sha256=self.sha256, size=self.size)


class ClientRelease(Schema):
    """A client that devices may install, as one bundle a system.

    Example:
        bundle = ClientBundle(target="bookworm-arm64", sha256=digest, size=11_500_000)
        release = ClientRelease(version="0.2.0", bundles=(bundle,))
        document = SignedDocument.create(operator_key, RELEASE_KIND, release.to_bytes())
    """

    type: Literal["covey-client-release"] = "covey-client-release"
    v: Literal[1] = PROTOCOL_VERSION
    version: ClientVersion
    bundles: Annotated[tuple[ClientBundle, ...], Field(min_length=1, max_length=MAX_BUNDLES)]
    """At most one for each system."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({bundle.target for bundle in self.bundles}) < len(self.bundles):
            raise ValueError("two bundles are for the same system")
        if self.number == 0:
            raise ValueError("versions begin with 0.0.1")
        return self

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
            where = ".".join(str(part) for part in first["loc"])
            raise MalformedMessage(f"not a client release: {where}: {first['msg']}"[:200]) from error

    @property
    def number(self) -> int:
        """What assignments call it; it rises with the version."""
        return version_number(self.version)

    def bundle_for(self, target: str) -> ClientBundle | None:
        """The bundle of a system; None when there is none for it."""
        return next((bundle for bundle in self.bundles if bundle.target == target), None)


def version_number(version: str) -> int:
    """The number of a version: 2003 for "0.2.3".

    Raises:
        ValueError: it has not three numbers below a thousand.
    """
    major, minor, patch = map(int, version.split("."))
    if not all(0 <= part < _PART for part in (major, minor, patch)):
        raise ValueError(f"{version!r} has a number above {_PART - 1}")
    return (major * _PART + minor) * _PART + patch


def version_text(number: int) -> str:
    """The version that has a number."""
    return f"{number // _PART**2}.{number // _PART % _PART}.{number % _PART}"


def numbered(version: int, model: str) -> str:
    """What people call a version of a model, or of the client."""
    return version_text(version) if model == CLIENT else str(version)
