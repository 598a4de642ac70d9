"""Blobs in chunks over a pipe that loses, repeats and reorders: the receiver pulls.

One protocol serves both directions. Someone names a blob (an upload offer, a signed manifest); the receiver
asks for a window of chunks that it lacks, and for one more as each arrives; what does not arrive is asked for
again. The sender has no state: it answers with the chunks asked for. So either side may restart at any
moment, and only what is missing travels again. transport.md has the measurements behind chunk and window.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protocol.codec import chunk_count, chunk_length
from protocol.errors import TransferError
from protocol.fields import BlobRef
from protocol.messages import CHUNK_BYTES, WINDOW, BlobChunk, BlobNeed


def describe(data: bytes) -> BlobRef:
    """Names a blob by its content."""
    return BlobRef.of(data)


def chunks(
    blob: BlobRef, data: bytes | memoryview, indices: Iterable[int]
) -> Iterator[tuple[BlobChunk, memoryview]]:
    """Yields the chunks of `data` that were asked for; indices beyond its end are ignored.

    Raises:
        TransferError: `data` has another size than the blob.
    """
    if len(data) != blob.size:
        raise TransferError(f"the blob {blob.sha256[:12]} has {len(data)} bytes here, not {blob.size}")
    view = memoryview(data)
    for index in indices:
        if index >= chunk_count(blob.size):
            continue
        start = index * CHUNK_BYTES
        body = view[start : start + chunk_length(blob.size, index)]
        yield BlobChunk(blob=blob, index=index, crc32=zlib.crc32(body)), body


@dataclass(frozen=True)
class Reception:
    """What a receiver knows of one transfer; the bytes themselves lie in the adapter's store.

    Attributes:
        blob: what is being received.
        missing: indices not yet stored, ascending.
        asked: indices asked for and not yet arrived.
    """

    blob: BlobRef
    missing: tuple[int, ...]
    asked: frozenset[int] = frozenset()

    @classmethod
    def begin(cls, blob: BlobRef, stored: Iterable[int] = ()) -> Reception:
        """Starts, or resumes with the chunks that are already `stored`."""
        have = frozenset(stored)
        return cls(blob, tuple(i for i in range(chunk_count(blob.size)) if i not in have))

    @property
    def complete(self) -> bool:
        """Every chunk is stored."""
        return not self.missing

    def ask(self, *, again: bool = False, most: int = WINDOW) -> tuple[Reception, BlobNeed | None]:
        """Fills the window; `again` after a time-out asks anew for what was asked before.

        Args:
            again: what is under way counts as lost.
            most: chunks to ask for at most, where the receiver keeps to a rate.

        Returns:
            The new state, and the request to send, if there is anything to ask for.
        """
        under_way = frozenset() if again else self.asked
        free = min(WINDOW - len(under_way), most)
        wanted = tuple(i for i in self.missing[: WINDOW + len(under_way)] if i not in under_way)[:free]
        if not wanted:
            return self, None
        asked = under_way | frozenset(wanted)
        return Reception(self.blob, self.missing, asked), BlobNeed(blob=self.blob, indices=wanted)

    def store(self, index: int) -> Reception:
        """Notes that the chunk at `index` is durably stored; a repeated chunk changes nothing."""
        missing = tuple(i for i in self.missing if i != index)
        return Reception(self.blob, missing, self.asked - {index})
