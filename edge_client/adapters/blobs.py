"""Model files by content, downloads that survive a restart, and masked inputs that wait for their receipt.

    blobs/<sha256>      whole and checked
    partial/<sha256>    a download; <sha256>.map says which chunks are surely in it
    uploads/<round id>  a packed masked input
    local/<sha256>      local parameters of a model; nothing that is sent is ever read from here
    pending/<sha256>    an update that waits for a buffer (`edge_client.pending_file`)
    personal/<model>    a version fine-tuned on this device, likewise (`edge_client.adapters.personal`)

A download's map is written every `MAP_EVERY` chunks and not with each, to spare an SD card: a power cut costs
at most that much of the download, and the digest over the whole finds whatever else it did.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_client.adapters.files import (
    StorageError,
    open_private,
    private_directory,
    storage_errors,
    sync_directory,
    write_durably,
)
from edge_client.adapters.personal import PersonalFiles
from edge_client.events import BlobFound
from protocol.codec import chunk_count
from protocol.fields import BlobRef
from protocol.messages import CHUNK_BYTES

MAP_EVERY = 16
_READ_BYTES = 1 << 20


class Blobs:
    """The device's files. Used by one process that writes; others may read whole blobs."""

    def __init__(self, root: Path) -> None:
        self._whole = root / "blobs"
        self._partial = root / "partial"
        self._uploads = root / "uploads"
        self._local = root / "local"
        self._pending = root / "pending"
        self.personal = PersonalFiles(root / "personal")
        self._arrived: dict[str, set[int]] = {}

    def prepare(self) -> None:
        """Makes the directories.

        Raises:
            StorageError: the file system refuses.
        """
        for directory in (self._whole, self._partial, self._uploads, self._local, self._pending):
            private_directory(directory)

    # --- models ------------------------------------------------------------------------------------------

    def has(self, blob: BlobRef) -> bool:
        """Whether a whole file of the right size is there; its content was checked when it was stored."""
        try:
            return (self._whole / blob.sha256).stat().st_size == blob.size
        except OSError:
            return False

    def path(self, blob: BlobRef) -> Path:
        """Where a whole blob lies."""
        return self._whole / blob.sha256

    def read(self, blob: BlobRef) -> bytes:
        """Reads a whole blob, checking it again; one that rotted on the card is deleted, to be fetched anew.

        Raises:
            StorageError: it is not there, cannot be read, or is damaged.
        """
        path = self._whole / blob.sha256
        with storage_errors(f"reading the model file {blob.sha256[:16]}"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            with contextlib.suppress(OSError):
                path.unlink()
            raise StorageError(5, f"the model file {blob.sha256[:16]} is damaged on disk")
        return data

    def store_chunk(self, blob: BlobRef, index: int, body: bytes | memoryview) -> None:
        """Writes one chunk of a download.

        Raises:
            StorageFull: no space is left.
            StorageError: the write failed.
        """
        arrived = self._arrived_chunks(blob)
        with storage_errors(f"storing a chunk of {blob.sha256[:16]}"):
            descriptor = open_private(self._partial / blob.sha256, os.O_WRONLY | os.O_CREAT)
            try:
                written = 0
                while written < len(body):
                    written += os.pwrite(descriptor, body[written:], index * CHUNK_BYTES + written)
                if (len(arrived) + 1) % MAP_EVERY == 0:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        arrived.add(index)
        if len(arrived) % MAP_EVERY == 0:
            write_durably(self._map(blob), [_bitmap(arrived, chunk_count(blob.size))])

    def find(self, blob: BlobRef) -> BlobFound:
        """Says what is there of a blob; a complete download is checked and becomes a whole blob.

        Raises:
            StorageError: reading or renaming failed.
        """
        whole = self._whole / blob.sha256
        with storage_errors(f"looking for {blob.sha256[:16]}"):
            if self.has(blob):
                if _digest(whole) == blob.sha256:
                    return BlobFound(blob, True)
                whole.unlink()
            arrived = self._arrived_chunks(blob)
            if len(arrived) < chunk_count(blob.size):
                return BlobFound(blob, False, tuple(sorted(arrived)))
            partial = self._partial / blob.sha256
            if partial.stat().st_size != blob.size or _digest(partial) != blob.sha256:
                self._forget(blob.sha256)
                return BlobFound(blob, False)
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(whole)
            sync_directory(self._whole)
            self._forget(blob.sha256)
        return BlobFound(blob, True)

    def keep(self, digests: frozenset[str]) -> None:
        """Deletes every blob and download that is not among these."""
        with storage_errors("deleting old model files"):
            for path in self._whole.iterdir():
                if path.name not in digests:
                    path.unlink(missing_ok=True)
            for path in self._partial.iterdir():
                if path.name.removesuffix(".map") not in digests:
                    self._forget(path.name.removesuffix(".map"))
                    path.unlink(missing_ok=True)

    def _map(self, blob: BlobRef) -> Path:
        return self._partial / f"{blob.sha256}.map"

    def _arrived_chunks(self, blob: BlobRef) -> set[int]:
        if blob.sha256 not in self._arrived:
            arrived: set[int] = set()
            with contextlib.suppress(OSError):
                if (self._partial / blob.sha256).exists():
                    bits = self._map(blob).read_bytes()
                    last = min(8 * len(bits), chunk_count(blob.size))
                    arrived = {i for i in range(last) if bits[i // 8] >> i % 8 & 1}
            self._arrived[blob.sha256] = arrived
        return self._arrived[blob.sha256]

    def _forget(self, sha256: str) -> None:
        self._arrived.pop(sha256, None)
        for name in (sha256, f"{sha256}.map"):
            (self._partial / name).unlink(missing_ok=True)

    # --- masked inputs -----------------------------------------------------------------------------------

    def write_upload(self, round_id: str, parts: Iterable[bytes]) -> BlobRef:
        """Writes a masked input durably, slice by slice; returns its name.

        Raises:
            StorageFull: no space is left.
            StorageError: the write failed.
        """
        digest, size = write_durably(self._uploads / round_id, parts)
        return BlobRef(sha256=digest, size=size)

    @contextlib.contextmanager
    def upload(self, round_id: str) -> Iterator[memoryview]:
        """A view of a masked input, without reading all of it.

        Raises:
            StorageError: it is not there.
        """
        with storage_errors(f"reading the masked input of {round_id}"):
            descriptor = os.open(self._uploads / round_id, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield view
        finally:
            os.close(descriptor)

    def remove_upload(self, round_id: str) -> None:
        """Deletes a masked input."""
        with storage_errors(f"deleting the masked input of {round_id}"):
            (self._uploads / round_id).unlink(missing_ok=True)

    def keep_upload(self, round_id: str | None) -> None:
        """Deletes every masked input but that of one round, and what a cut left half written."""
        with storage_errors("deleting old masked inputs"):
            for path in self._uploads.iterdir():
                if path.name != round_id:
                    path.unlink(missing_ok=True)

    # --- local parameters --------------------------------------------------------------------------------

    def write_local(self, data: bytes) -> BlobRef:
        """Writes local parameters durably; they count once the database names them.

        Raises:
            StorageFull: no space is left.
            StorageError: the write failed.
        """
        return _write(self._local, data)

    def read_local(self, blob: BlobRef) -> bytes:
        """Reads local parameters, checking them.

        Raises:
            StorageError: they are not there, cannot be read, or are damaged.
        """
        return _read(self._local, blob, "local parameters")

    def keep_local(self, digests: frozenset[str]) -> None:
        """Deletes all local parameters that are not among these."""
        _keep(self._local, digests, "local parameters")

    # --- pending updates ---------------------------------------------------------------------------------

    def write_pending(self, data: bytes) -> BlobRef:
        """Writes a pending update durably; it counts once the database names it.

        Raises:
            StorageFull: no space is left.
            StorageError: the write failed.
        """
        return _write(self._pending, data)

    def read_pending(self, blob: BlobRef) -> bytes:
        """Reads a pending update, checking it.

        Raises:
            StorageError: it is not there, cannot be read, or is damaged.
        """
        return _read(self._pending, blob, "a pending update")

    def keep_pending(self, digests: frozenset[str]) -> None:
        """Deletes all pending updates that are not among these."""
        _keep(self._pending, digests, "pending updates")


def _write(directory: Path, data: bytes) -> BlobRef:
    blob = BlobRef.of(data)
    write_durably(directory / blob.sha256, [data])
    return blob


def _read(directory: Path, blob: BlobRef, what: str) -> bytes:
    with storage_errors(f"reading {what}"):
        data = (directory / blob.sha256).read_bytes()
    if hashlib.sha256(data).hexdigest() != blob.sha256:
        raise StorageError(5, f"{what} cannot be used: damaged on disk")
    return data


def _keep(directory: Path, digests: frozenset[str], what: str) -> None:
    with storage_errors(f"deleting old {what}"):
        for path in directory.iterdir():
            if path.name not in digests:
                path.unlink(missing_ok=True)


def _bitmap(indices: Iterable[int], count: int) -> bytes:
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
