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


class Downloads:
    """Serves the artefacts of published versions, and nothing else; each request is at most one window."""

    def __init__(self, store: ArtefactStore) -> None:
        """Serves from `store`."""
        self._store = store
        self._published: frozenset[BlobRef] = frozenset()
        self._newest: tuple[Version, ...] = ()

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
            if index >= chunk_count(need.blob.size):
                continue
            length = chunk_length(need.blob.size, index)
            try:
                body = self._store.read_range(need.blob, index * CHUNK_BYTES, length)
            except MissingArtefact as error:
                logger.error("%s", error)
                return
            work.send(device_id, BlobChunk(blob=need.blob, index=index, crc32=zlib.crc32(body)), body)
