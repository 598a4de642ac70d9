"""Artefacts by content: graphs and weights, and the signed manifests that name them."""

from __future__ import annotations

from typing import Protocol

from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.identity import SignedDocument


class MissingArtefact(Exception):
    """The registry does not hold this artefact, or holds something else in its place."""


class StoreUnavailable(OSError):
    """The store cannot be reached or used now; the message says why. The same request may succeed later."""


class ArtefactStore(Protocol):
    """Where artefacts lie: a directory of this machine, or an object store.

    Every method raises StoreUnavailable, or another OSError, when the store cannot be used at the moment:
    whoever asked asks again later, and nothing is given up for it.
    """

    def put(self, data: bytes) -> BlobRef:
        """Stores an artefact durably; storing it again changes nothing."""
        ...

    def read(self, blob: BlobRef) -> bytes:
        """Reads a whole artefact and checks it.

        Raises:
            MissingArtefact: it is not there, or damaged.
        """
        ...

    def read_range(self, blob: BlobRef, start: int, length: int) -> bytes:
        """Reads a part of an artefact, unchecked.

        Raises:
            MissingArtefact: it is not there, or has another size.
        """
        ...

    def remove(self, blob: BlobRef) -> None:
        """Removes an artefact; nothing happens when it is not there."""
        ...

    def held(self) -> frozenset[str]:
        """SHA-256, hexadecimal, of every artefact that is there."""
        ...

    def put_manifest(self, manifest: ModelManifest, document: SignedDocument) -> None:
        """Stores the signed manifest of a version durably."""
        ...
