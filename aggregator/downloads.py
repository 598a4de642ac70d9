"""Answers devices that pull artefacts of published models, chunk by chunk."""

from __future__ import annotations

import logging
import zlib

from aggregator.records import Version
from aggregator.registry.artefacts import ArtefactStore, MissingArtefact
from aggregator.registry.publishing import artefacts_of
from aggregator.repository import Reader
from aggregator.work import Work
from protocol.codec import chunk_count, chunk_length
from protocol.fields import BlobRef
from protocol.messages import CHUNK_BYTES, BlobChunk, BlobNeed

logger = logging.getLogger(__name__)

BURST_CHUNKS = 256
CHUNKS_PER_SECOND = 64
"""A request of 200 bytes is answered with 256 KiB, which the broker keeps for a device that does not read. So
one device gets 16 MiB at once and 4 MiB a second, about what it can write to its card."""


class Downloads:
    """Serves the artefacts of published versions, and nothing else; each request is at most one window."""

    def __init__(self, store: ArtefactStore) -> None:
        """Serves from `store`."""
        self._store = store
        self._published: frozenset[BlobRef] = frozenset()
        self._newest: tuple[Version, ...] = ()
        self._credit: dict[str, tuple[float, float]] = {}

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
        """Takes one chunk off what a device may have now (a token bucket); False when that is used up."""
        credit, since = self._credit.get(device_id, (float(BURST_CHUNKS), clock))
        credit = min(float(BURST_CHUNKS), credit + CHUNKS_PER_SECOND * (clock - since))
        enough = credit >= 1
        self._credit[device_id] = (credit - enough, clock)
        return enough
