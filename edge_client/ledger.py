"""The device's own record of what it gave: one entry for every masked input, made before it is offered."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from protocol.dp.events import DPEvent
from protocol.fields import RoundId, Sha256, Slug, UnixTime


class LedgerEntry(BaseModel):
    """One contribution.

    It is entered when the masked input is made, whether or not the round completes: a device cannot know what
    became of an input that it handed out. `event` assumes the fewest survivors that the plan allows, which is
    the worst case for this device.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    round_id: RoundId
    at: UnixTime
    fleet: Slug
    model: Slug
    base_version: Annotated[int, Field(ge=1)]
    plan_sha256: Sha256
    signer: Sha256
    delta: Annotated[float, Field(gt=0, lt=1)]
    event: DPEvent
