"""Artefacts in a directory of this machine.

    DIR/blobs/<sha256>                    one artefact, named by what it holds
    DIR/models/<model>/<version>.json     the signed manifest of one version

Files appear whole or not at all and are synced before they are named anywhere else. Which versions are
published is for the repository to say; a file that a crash left behind is found by nobody.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregator.registry.artefacts import MissingArtefact, StoreUnavailable
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.identity import SignedDocument


class DirectoryStore:
    """An artefact store in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        """Uses `directory`, which is made when it is not there."""
        self._blobs = directory / "blobs"
        self._models = directory / "models"
        for path in (directory, self._blobs, self._models):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes) -> BlobRef:
        """Stores an artefact durably."""
        blob = BlobRef.of(data)
        path = self._path(blob)
        with _usable():
            if not path.exists():
                _write_durably(path, data)
        return blob

    def read(self, blob: BlobRef) -> bytes:
        """Reads a whole artefact and checks it."""
        data = self.read_range(blob, 0, blob.size)
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise MissingArtefact(f"the file {self._path(blob)} is damaged: restore it from a backup")
        return data

    def read_range(self, blob: BlobRef, start: int, length: int) -> bytes:
        """Reads a part of an artefact."""
        try:
            with _usable(), self._path(blob).open("rb") as file:
                if os.fstat(file.fileno()).st_size != blob.size:
                    raise MissingArtefact(f"the artefact {blob.sha256[:12]} has another size here")
                file.seek(start)
                return file.read(length)
        except FileNotFoundError as error:
            raise MissingArtefact(f"the artefact {blob.sha256[:12]} is not there") from error

    def remove(self, blob: BlobRef) -> None:
        """Removes an artefact; nothing happens when it is not there."""
        with _usable():
            self._path(blob).unlink(missing_ok=True)

    def held(self) -> frozenset[str]:
        """SHA-256 of every artefact that is there."""
        with _usable():
            # A hidden name is that of a file that is being written.
            return frozenset(path.name for path in self._blobs.iterdir() if path.name[0] != ".")

    def put_manifest(self, manifest: ModelManifest, document: SignedDocument) -> None:
        """Stores the signed manifest of a version durably."""
        directory = self._models / manifest.name
        with _usable():
            directory.mkdir(mode=0o700, exist_ok=True)
            _write_durably(directory / f"{manifest.version}.json", document.model_dump_json().encode())

    def shrink(self, limit: int) -> None:
        """Removes the oldest artefacts until at most `limit` bytes are left: for a store of copies."""
        files = sorted((path.stat().st_mtime_ns, path) for path in self._blobs.iterdir())
        total = sum(path.stat().st_size for _, path in files)
        for _, path in files[:-1]:  # the newest is in use, however large
            if total <= limit:
                break
            total -= path.stat().st_size
            path.unlink()

    def _path(self, blob: BlobRef) -> Path:
        # Safe as a file name: the schema of BlobRef lets only a hexadecimal digest through.
        return self._blobs / blob.sha256


@contextmanager
def _usable() -> Iterator[None]:
    """Says so when the disk cannot be used now; a file that is not there is for the caller to judge."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"the registry cannot be used: {error.strerror}") from error


def _write_durably(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
