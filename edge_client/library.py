"""What this device has of each model, and what the disk remembers of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edge_client.durable import PendingUpdate, SaveLocal, VersionStatus
from edge_client.outputs import Outputs
from edge_client.pulling import Pull, asked_for
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import CHUNK_BYTES, WINDOW, VersionFailure
from protocol.token_bucket import TokenBucket
from protocol.version_assignment import VersionAssignment

KEPT_VERSIONS = 2
MAX_REASON = 300


@dataclass(frozen=True)
class Version:
    """A verified manifest with the document that its signer signed."""

    document: SignedDocument
    manifest: ModelManifest

    @property
    def sha256(self) -> str:
        """The version's identity: the digest of its manifest, as plans name it."""
        return self.document.digest.hex()

    @property
    def blobs(self) -> tuple[BlobRef, BlobRef]:
        """What its files are; the graph is shared by all versions of a model."""
        return self.manifest.graph, self.manifest.weights


@dataclass(frozen=True, kw_only=True)
class Fetching(Pull):
    """A version whose files are on their way."""

    version: Version


@dataclass(frozen=True)
class Testing:
    """A candidate that is whole, and is being loaded and run once.

    Attributes:
        test_at: when to test it anew, after a test that this device's own state prevented.
    """

    version: Version
    test_at: float | None = None


@dataclass(frozen=True)
class Ready:
    """A base that is whole and runs."""

    version: Version


@dataclass(frozen=True)
class Standing:
    """What this device was last told to have, as the fleet or by itself.

    Attributes:
        sequence: of the assignment; no lower one is taken again.
        version: None when a device's own assignment was taken away.
    """

    sequence: int
    version: Version | None


@dataclass(frozen=True)
class Shelf:
    """All that this device knows of one model.

    Attributes:
        good: tested versions, in the order in which they were served; the last one is.
        candidate: the version that is to be served next.
        base: a version that a round is about and that is not to be served.
        bad: digests of versions that do not run here -> the reason.
        failure: the version that failed last, until a newer one runs.
        fleet: what every device without an assignment of its own is to have.
        own: what this one is to have.
    """

    good: tuple[Version, ...] = ()
    candidate: Fetching | Testing | None = None
    base: Fetching | Testing | Ready | None = None
    bad: Mapping[str, str] = field(default_factory=dict)
    failure: VersionFailure | None = None
    fleet: Standing | None = None
    own: Standing | None = None

    @property
    def newest(self) -> int:
        """The highest version number that is, or is to be, served here; 0 for none."""
        candidate = self.candidate.version.manifest.version if self.candidate else 0
        return max(candidate, *(version.manifest.version for version in self.good), 0)

    @property
    def serving(self) -> Version | None:
        """The version that answers predictions."""
        return self.good[-1] if self.good else None

    @property
    def wanted(self) -> Version | None:
        """The version that this device is to have, as far as it was told."""
        if self.own is not None and self.own.version is not None:
            return self.own.version
        return None if self.fleet is None else self.fleet.version

    @property
    def known(self) -> tuple[Version, ...]:
        """Every version that is here, or on its way."""
        under_way = (self.candidate, self.base)
        return (*self.good, *(each.version for each in under_way if each is not None))

    def moved(self, place: Literal["candidate", "base"], each: Fetching | Testing | Ready) -> Shelf:
        """The shelf with what became of something under way."""
        if place == "base":
            return replace(self, base=each)
        return self if isinstance(each, Ready) else replace(self, candidate=each)

    def under_way(self) -> Iterator[tuple[Literal["candidate", "base"], Fetching | Testing]]:
        """What is being fetched or tested."""
        if self.candidate is not None:
            yield "candidate", self.candidate
        if isinstance(self.base, Fetching | Testing):
            yield "base", self.base


@dataclass(frozen=True)
class Library:
    """Every model's shelf, by name.

    Attributes:
        own: this device's local parameters of models that have such, by model; they outlive versions.
        pending: updates that wait for a buffer, by model.
        download: bytes that may be asked for; no limit when None.
    """

    shelves: Mapping[str, Shelf] = field(default_factory=dict)
    own: Mapping[str, SaveLocal] = field(default_factory=dict)
    pending: Mapping[str, PendingUpdate] = field(default_factory=dict)
    download: TokenBucket | None = None

    def shelf(self, model: str) -> Shelf:
        """The shelf of a model; an empty one when it is not known."""
        return self.shelves.get(model, Shelf())

    def serving(self) -> dict[str, int]:
        """Model name -> version served."""
        return {
            name: shelf.good[-1].manifest.version
            for name, shelf in sorted(self.shelves.items())
            if shelf.good
        }

    def failures(self) -> dict[str, VersionFailure]:
        """Model name -> the version that failed here last."""
        return {name: shelf.failure for name, shelf in sorted(self.shelves.items()) if shelf.failure}

    def find(self, model: str, sha256: str) -> Version | None:
        """The version with this digest, good or on its way."""
        return next((version for version in self.shelf(model).known if version.sha256 == sha256), None)

    def ready(self, model: str, sha256: str) -> bool:
        """Whether the version with this digest is on disk and runs."""
        shelf = self.shelf(model)
        ready = (*shelf.good, *((shelf.base.version,) if isinstance(shelf.base, Ready) else ()))
        return any(version.sha256 == sha256 for version in ready)

    def blobs(self) -> frozenset[str]:
        """Digests of every file that a version here needs."""
        return frozenset(
            blob.sha256
            for shelf in self.shelves.values()
            for version in shelf.known
            for blob in version.blobs
        )

    def local(self, manifest: ModelManifest) -> BlobRef | None:
        """This device's local parameters for a version; None if it has none of these names and shapes yet.

        Then they start where the version says. Those of other shapes stay until a round replaces them, so
        that a version that is taken back finds its own again.
        """
        own = self.own.get(manifest.name)
        return own.blob if own is not None and own.layout == manifest.local_layout else None

    def with_local(self, saved: SaveLocal) -> Library:
        """The library after a round has moved a model's local parameters."""
        return replace(self, own={**self.own, saved.model: saved})

    def with_pending(self, update: PendingUpdate) -> Library:
        """The library with an update that waits, in place of the one of its model before."""
        return replace(self, pending={**self.pending, update.manifest.name: update})

    def without_pending(self, model: str) -> Library:
        """The library without a pending update of a model."""
        return replace(self, pending={name: each for name, each in self.pending.items() if name != model})

    def affords(self, now: float) -> int:
        """Chunks that the download limit lets this device ask for, on the steady clock."""
        return WINDOW if self.download is None else self.download.affords(CHUNK_BYTES, now)

    def charged(self, outputs: Outputs, now: float) -> Library:
        """The library after what is asked for was taken off the download limit."""
        count = asked_for(outputs)
        if self.download is None or not count:
            return self
        return replace(self, download=self.download.spend(count * CHUNK_BYTES, now))

    def with_shelf(self, model: str, shelf: Shelf) -> Library:
        """The library with another shelf of a model."""
        return replace(self, shelves={**self.shelves, model: shelf})


@dataclass(frozen=True)
class StoredVersion:
    """A version as the disk remembers it."""

    document: SignedDocument
    manifest: ModelManifest
    status: VersionStatus
    reason: str
    served: int = 0
    """Rises with each version that was served, or failed; 0 before."""


@dataclass(frozen=True)
class StoredStanding:
    """What the disk remembers that this device was told."""

    assignment: VersionAssignment
    version: Version | None


def restore(
    stored: Iterable[StoredVersion],
    own: Iterable[SaveLocal] = (),
    standings: Iterable[StoredStanding] = (),
    pending: Iterable[PendingUpdate] = (),
) -> Library:
    """The library that an earlier process left; `resume` takes up what was under way."""
    library = Library(
        own={saved.model: saved for saved in own}, pending={each.manifest.name: each for each in pending}
    )
    for told in standings:
        shelf = library.shelf(told.assignment.model)
        standing = Standing(told.assignment.sequence, told.version)
        library = library.with_shelf(told.assignment.model, placed(shelf, told.assignment, standing))
    for item in sorted(stored, key=lambda item: (item.served, item.manifest.version)):
        version = Version(item.document, item.manifest)
        shelf = library.shelf(item.manifest.name)
        if item.status is VersionStatus.GOOD:
            shelf = served(shelf, version)
        elif item.status is VersionStatus.BAD:
            shelf = blamed(shelf, version, item.reason)
        elif item.status is VersionStatus.CANDIDATE:
            shelf = replace(shelf, candidate=Fetching(version=version, todo=version.blobs))
        else:
            # Whether it runs is found out again.
            shelf = replace(shelf, base=Fetching(version=version, todo=version.blobs))
        library = library.with_shelf(item.manifest.name, shelf)
    return library


def placed(shelf: Shelf, assignment: VersionAssignment, standing: Standing) -> Shelf:
    """The shelf with what an assignment says: to all devices, or to this one."""
    if assignment.device is None:
        return replace(shelf, fleet=standing)
    return replace(shelf, own=standing)


def served(shelf: Shelf, version: Version) -> Shelf:
    """The shelf with this version served; those served before it are kept as far as they are wanted."""
    others = tuple(other for other in shelf.good if other.sha256 != version.sha256)
    failure = shelf.failure
    if failure is not None and failure.version < version.manifest.version:
        failure = None
    return replace(shelf, good=(*others, version)[-KEPT_VERSIONS:], failure=failure)


def blamed(shelf: Shelf, version: Version, reason: str) -> Shelf:
    """The shelf with this version among the bad ones."""
    code, _, detail = reason.partition(": ")
    failure = VersionFailure(version=version.manifest.version, code=code, detail=_printable(detail))
    return replace(shelf, bad={**shelf.bad, version.sha256: reason}, failure=failure)


def _printable(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:MAX_REASON]


def download_limit(rate: float, now: float) -> TokenBucket:
    """Lets `rate` bytes a second be asked for on average, from `now` on; a chunk at once always."""
    return TokenBucket.full(rate, max(rate, CHUNK_BYTES), now)
