"""Field types that every network-borne schema shares: strict, and bounded in size."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION: Final = 1

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""A name that is safe in a topic, a file name and a certificate: lower case, digits and hyphens."""

RoundId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Field(min_length=64, max_length=64)]
Certificate = Annotated[bytes, Field(min_length=64, max_length=2048)]
UnixTime = Annotated[int, Field(ge=0, le=2**40)]
Index = Annotated[int, Field(ge=0, lt=2**16)]
"""A client's position in the roster of its round."""

MAX_COHORT = 2**14
MAX_BLOB_BYTES = 2**30


class Schema(BaseModel):
    """Base of everything that crosses the network: immutable, strict, no unknown fields, bytes as base64."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        # Most schemas are only ever part of a message, whose own schema holds them.
        defer_build=True,
    )


class BlobRef(Schema):
    """What a transfer carries, by content: a blob with this digest and this many bytes."""

    sha256: Sha256
    size: Annotated[int, Field(ge=1, le=MAX_BLOB_BYTES)]

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Names these bytes.

        Raises:
            ValidationError: there are none, or more than a blob may have.
        """
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
