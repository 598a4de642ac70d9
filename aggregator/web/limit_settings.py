"""The bounds of the API, as `aggregator.json` may set them; without the web server that keeps them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from protocol.enrolment import MAX_REQUEST_BYTES

MiB = 2**20
Rate = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}/(second|minute|hour)$")]


class Limits(BaseModel):
    """Bounds of the API.

    Attributes:
        body_bytes: of a request.
        upload_bytes: of a request that publishes a model, or bundles of the client.
        enrolment_bytes: of a device's request to be let in, which is read before anything is known of it.
        per_address: requests from one address, all its tokens together.
        per_principal: requests of one token or person.
        failures: requests from one address with credentials that open nothing.
        enrolments: requests of devices that want to be let in, from one address; a site may have only one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: Annotated[int, Field(ge=1024)] = MiB
    upload_bytes: Annotated[int, Field(ge=1024)] = 256 * MiB
    enrolment_bytes: Annotated[int, Field(ge=1024)] = MAX_REQUEST_BYTES
    per_address: Rate = "3000/minute"
    per_principal: Rate = "1200/minute"
    failures: Rate = "20/minute"
    enrolments: Rate = "240/minute"


DEFAULT_LIMITS = Limits()
