"""Answers devices that pull artefacts of published models, chunk by chunk."""

from __future__ import annotations

import logging
import zlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from aggregator.records import Version
from aggregator.registry.artefacts import ArtefactStore, MissingArtefact
from aggregator.registry.publishing import artefacts_of
from aggregator.repository import Reader
from aggregator.work import Work
from protocol.codec import chunk_count, chunk_length
from protocol.fields import BlobRef
from protocol.messages import CHUNK_BYTES, BlobChunk, BlobNeed
from protocol.token_bucket import TokenBucket

logger = logging.getLogger(__name__)

BURST_BYTES = 256 * CHUNK_BYTES


class DownloadLimits(BaseModel):
    """How fast models go out. A request of 200 bytes is answered with 256 KiB, which the broker keeps for a
    device that does not read.

    Attributes:
        device_rate: bytes a second to one device, after 16 MiB at once; by default about what it can write to
            its card.
        fleet_rate: bytes a second to all devices together; no limit when None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_rate: Annotated[float, Field(ge=CHUNK_BYTES, allow_inf_nan=False)] = 4.0 * 2**20
    fleet_rate: Annotated[float, Field(ge=CHUNK_BYTES, allow_inf_nan=False)] | None = None


DEFAULT_LIMITS = DownloadLimits()


class Downloads:
    """Serves the artefacts of published versions, and nothing else; each request is at most one window."""

    def __init__(self, store: ArtefactStore, limits: DownloadLimits) -> None:
        """Serves from `store`, within `limits`."""
        self._store = store
        self._limits = limits
        self._published: frozenset[BlobRef] = frozenset()
        self._newest: tuple[Version, ...] = ()
        self._devices: dict[str, TokenBucket] = {}
        self._fleet: TokenBucket | None = None

    def answer(self, work: Work, reader: Reader, device_id: str, need: BlobNeed) -> None:
        """Sends the chunks that were asked for. The device asks again for what it did not get."""
        if need.blob not in self._published:
            newest = reader.newest_versions()
            # Asking for what is not there costs one look, not a walk through all versions.
            if newest != self._newest:
                self._newest, self._published = newest, frozenset(artefacts_of(reader))
        if need.blob not in self._published:
            logger.warning("%s asks for %s, which no version has", device_id, need.blob.sha256[:12])
            return
        for index in sorted(set(need.indices)):
            if not self._spend(device_id, work.at.clock):
                return  # it asks again, and later
            if index >= chunk_count(need.blob.size):
                continue
            length = chunk_length(need.blob.size, index)
            try:
                body = self._store.read_range(need.blob, index * CHUNK_BYTES, length)
            except (MissingArtefact, OSError) as error:
                # Of downloads alone: rounds go on, and the device asks again.
                logger.error("%s cannot have %s: %s", device_id, need.blob.sha256[:12], error)
                return
            work.send(device_id, BlobChunk(blob=need.blob, index=index, crc32=zlib.crc32(body)), body)

    def _spend(self, device_id: str, clock: float) -> bool:
        """Takes one chunk off what a device, and the fleet, may have now; False when that is used up."""
        own = self._devices.get(device_id)
        if own is None:
            own = TokenBucket.full(self._limits.device_rate, BURST_BYTES, clock)
        if not own.affords(CHUNK_BYTES, clock):
            return False
        rate = self._limits.fleet_rate
        if rate is not None:
            fleet = self._fleet or TokenBucket.full(rate, rate, clock)
            if not fleet.affords(CHUNK_BYTES, clock):
                return False
            self._fleet = fleet.spend(CHUNK_BYTES, clock)
        self._devices[device_id] = own.spend(CHUNK_BYTES, clock)
        return True
