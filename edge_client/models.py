"""Which version of each model this device serves, fetches and distrusts.

    announced --verified--> Fetching --all blobs whole--> Testing --ran--> good (served from then on)
                                                             |
                                                             +--cannot run--> bad (never fetched again)

The two newest good versions are kept: the newest is served, the other is what it falls back to. A candidate
changes nothing for anybody until it is good, and becoming good is one row in one transaction. Versions only
go up, so that nobody can bring back an old one by repeating its announcement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_client.events import (
    Announce,
    BlobFound,
    FindBlob,
    ForgetVersion,
    Output,
    Outputs,
    SaveLocal,
    SaveVersion,
    Send,
    Stamp,
    StoreChunk,
    TestVersion,
    VersionStatus,
    VersionTested,
    note,
    warning,
)
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import MAX_MODELS, BlobChunk
from protocol.plan import MODEL_KIND
from protocol.transfer import Reception

KEPT_VERSIONS = 2
ASK_AGAIN_SECONDS = 3.0
MAX_ASK_AGAIN_SECONDS = 60.0
TEST_AGAIN_SECONDS = 60.0


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


@dataclass(frozen=True)
class Fetching:
    """A candidate whose files are on their way.

    Attributes:
        todo: blobs not known to be on disk; the first is the one under way.
        reception: of the first of `todo`; None until the disk was looked at.
        ask_at: when to ask again for what did not come, on the steady clock.
        patience: seconds until then; doubles each time.
    """

    version: Version
    todo: tuple[BlobRef, ...]
    reception: Reception | None = None
    ask_at: float = 0.0
    patience: float = ASK_AGAIN_SECONDS


@dataclass(frozen=True)
class Testing:
    """A candidate that is whole, and is being loaded and run once.

    Attributes:
        test_at: when to test it anew, after a test that this device's own state prevented.
    """

    version: Version
    test_at: float | None = None


@dataclass(frozen=True)
class Shelf:
    """All that this device knows of one model.

    Attributes:
        good: tested versions, ascending; the last one is served.
        bad: digests of versions that do not run here -> the reason.
    """

    good: tuple[Version, ...] = ()
    candidate: Fetching | Testing | None = None
    bad: Mapping[str, str] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """The highest version number that was ever accepted here; 0 for none."""
        candidate = self.candidate.version.manifest.version if self.candidate else 0
        return max(candidate, *(version.manifest.version for version in self.good), 0)


@dataclass(frozen=True)
class Library:
    """Every model's shelf, by name.

    Attributes:
        own: this device's local parameters of models that have such, by model; they outlive versions.
    """

    shelves: Mapping[str, Shelf] = field(default_factory=dict)
    own: Mapping[str, SaveLocal] = field(default_factory=dict)

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

    def find(self, model: str, sha256: str) -> Version | None:
        """The version with this digest, good or on its way."""
        shelf = self.shelf(model)
        known = (*shelf.good, *((shelf.candidate.version,) if shelf.candidate else ()))
        return next((version for version in known if version.sha256 == sha256), None)

    def ready(self, model: str, sha256: str) -> bool:
        """Whether the version with this digest is on disk and runs."""
        return any(version.sha256 == sha256 for version in self.shelf(model).good)

    def blobs(self) -> frozenset[str]:
        """Digests of every file that a version here needs."""
        return frozenset(
            blob.sha256
            for shelf in self.shelves.values()
            for version in (*shelf.good, *((shelf.candidate.version,) if shelf.candidate else ()))
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

    def _with(self, model: str, shelf: Shelf) -> Library:
        return replace(self, shelves={**self.shelves, model: shelf})


@dataclass(frozen=True)
class StoredVersion:
    """A version as the disk remembers it."""

    document: SignedDocument
    manifest: ModelManifest
    status: VersionStatus
    reason: str


def restore(stored: Iterable[StoredVersion], own: Iterable[SaveLocal] = ()) -> Library:
    """The library that an earlier process left; `resume` takes up its candidates."""
    library = Library(own={saved.model: saved for saved in own})
    for item in sorted(stored, key=lambda item: item.manifest.version):
        version = Version(item.document, item.manifest)
        shelf = library.shelf(item.manifest.name)
        if item.status is VersionStatus.GOOD:
            shelf = replace(shelf, good=(*shelf.good, version))
        elif item.status is VersionStatus.BAD:
            shelf = replace(shelf, bad={**shelf.bad, version.sha256: item.reason})
        else:
            shelf = replace(shelf, candidate=Fetching(version, version.blobs))
        library = library._with(item.manifest.name, shelf)
    return library


def resume(library: Library) -> Outputs:
    """Looks on the disk for the candidates' files, at the start of a process."""
    return tuple(
        FindBlob(shelf.candidate.todo[0])
        for shelf in library.shelves.values()
        if isinstance(shelf.candidate, Fetching)
    )


def open_manifest(document: SignedDocument, signers: Mapping[str, Ed25519PublicKey]) -> Version:
    """Verifies a signed manifest.

    Raises:
        BadSignature: nobody of the `signers` signed it.
        InvalidManifest: what they signed is no manifest.
    """
    payload = document.open(MODEL_KIND, dict(signers))
    return Version(document, ModelManifest.from_bytes(payload))


def announced(library: Library, version: Version, stamp: Stamp) -> tuple[Library, Outputs]:
    """A model's newest version was announced, and its signature verified."""
    name, number = version.manifest.name, version.manifest.version
    shelf = library.shelf(name)
    if library.find(name, version.sha256) is not None or version.sha256 in shelf.bad:
        return library, ()
    if name not in library.shelves and len(library.shelves) >= MAX_MODELS:
        # A status has no room for more, and the disk has its limits, too.
        return library, (warning("too-many-models", model=name, held=len(library.shelves)),)
    if number <= shelf.newest:
        detail = {"model": name, "version": number, "held": shelf.newest}
        return library, (warning("announcement-not-newer", **detail),)
    dropped = (ForgetVersion(shelf.candidate.version.sha256),) if shelf.candidate is not None else ()
    candidate = Fetching(version, version.blobs, ask_at=stamp.steady + ASK_AGAIN_SECONDS)
    return library._with(name, replace(shelf, candidate=candidate)), (
        *dropped,
        SaveVersion(version.document, version.manifest, VersionStatus.CANDIDATE),
        note("version-announced", model=name, version=number),
        FindBlob(candidate.todo[0]),
    )


def blob_found(library: Library, event: BlobFound, stamp: Stamp) -> tuple[Library, Outputs]:
    """The disk was looked at for a blob: fetch what lacks, go on to the next, or test the version."""
    outputs: list[Output] = []
    for name, shelf in library.shelves.items():
        candidate = shelf.candidate
        if not isinstance(candidate, Fetching) or candidate.todo[0] != event.blob:
            continue
        shelf, more = _advance(shelf, candidate, event, stamp)
        library = library._with(name, shelf)
        outputs.extend(more)
    return library, tuple(outputs)


def _advance(shelf: Shelf, candidate: Fetching, event: BlobFound, stamp: Stamp) -> tuple[Shelf, Outputs]:
    version = candidate.version
    if not event.complete:
        broken = candidate.reception is not None
        # Chunks carry no signature: a wrong digest is the carrier's fault and says nothing about the version.
        reception = Reception.begin(event.blob, event.chunks)
        if broken:
            patience = min(2 * candidate.patience, MAX_ASK_AGAIN_SECONDS)
            waiting = replace(
                candidate, reception=reception, ask_at=stamp.steady + patience, patience=patience
            )
            return replace(shelf, candidate=waiting), (
                warning("download-corrupt", blob=event.blob.sha256[:16], retry_s=patience),
            )
        return _ask(shelf, candidate, reception, stamp)
    todo = candidate.todo[1:]
    if todo:
        following = Fetching(version, todo, ask_at=stamp.steady + ASK_AGAIN_SECONDS)
        return replace(shelf, candidate=following), (FindBlob(todo[0]),)
    return replace(shelf, candidate=Testing(version)), (TestVersion(version.sha256, version.manifest),)


def _ask(
    shelf: Shelf, candidate: Fetching, reception: Reception, stamp: Stamp, *, again: bool = False
) -> tuple[Shelf, Outputs]:
    reception, need = reception.ask(again=again)
    patience = min(2 * candidate.patience, MAX_ASK_AGAIN_SECONDS) if again else ASK_AGAIN_SECONDS
    candidate = replace(candidate, reception=reception, ask_at=stamp.steady + patience, patience=patience)
    return replace(shelf, candidate=candidate), (Send(need),) if need else ()


def chunk_received(
    library: Library, chunk: BlobChunk, body: bytes | memoryview, stamp: Stamp
) -> tuple[Library, Outputs]:
    """A chunk came: store it if a candidate lacks it, and ask for the next."""
    for name, shelf in library.shelves.items():
        candidate = shelf.candidate
        if not isinstance(candidate, Fetching) or candidate.reception is None:
            continue
        if candidate.reception.blob != chunk.blob or chunk.index not in candidate.reception.missing:
            continue
        reception = candidate.reception.store(chunk.index)
        stored = StoreChunk(chunk.blob, chunk.index, body)
        if reception.complete:
            shelf = replace(shelf, candidate=replace(candidate, reception=reception))
            return library._with(name, shelf), (stored, FindBlob(chunk.blob))
        shelf, outputs = _ask(shelf, candidate, reception, stamp)
        return library._with(name, shelf), (stored, *outputs)
    return library, ()


def ticked(library: Library, stamp: Stamp, *, hurry: bool = False) -> tuple[Library, Outputs]:
    """Asks again for what did not come; `hurry` after a reconnect, when requests may have been lost."""
    outputs: list[Output] = []
    for name, shelf in library.shelves.items():
        candidate = shelf.candidate
        if isinstance(candidate, Fetching) and (hurry or stamp.steady >= candidate.ask_at):
            if candidate.reception is None or candidate.reception.complete:
                shelf = replace(
                    shelf, candidate=replace(candidate, ask_at=stamp.steady + MAX_ASK_AGAIN_SECONDS)
                )
                outputs.append(FindBlob(candidate.todo[0]))
            else:
                shelf, more = _ask(shelf, candidate, candidate.reception, stamp, again=True)
                outputs.extend(more)
        elif isinstance(candidate, Testing) and candidate.test_at is not None:
            if stamp.steady < candidate.test_at:
                continue
            shelf = replace(shelf, candidate=Testing(candidate.version))
            outputs.append(TestVersion(candidate.version.sha256, candidate.version.manifest))
        else:
            continue
        library = library._with(name, shelf)
    return library, tuple(outputs)


def tested(library: Library, event: VersionTested, stamp: Stamp) -> tuple[Library, Outputs]:
    """A candidate ran, or did not: switch to it, or remember it as bad."""
    for name, shelf in library.shelves.items():
        candidate = shelf.candidate
        if not isinstance(candidate, Testing) or candidate.version.sha256 != event.sha256:
            continue
        version, fault = candidate.version, event.fault
        detail = {"model": name, "version": version.manifest.version}
        if fault is not None and fault.transient:
            shelf = replace(shelf, candidate=replace(candidate, test_at=stamp.steady + TEST_AGAIN_SECONDS))
            return library._with(name, shelf), (
                warning("version-not-tested", **detail, code=fault.code, reason=fault.detail),
            )
        if fault is not None:
            reason = f"{fault.code}: {fault.detail}"
            shelf = replace(shelf, candidate=None, bad={**shelf.bad, version.sha256: reason})
            return library._with(name, shelf), (
                SaveVersion(version.document, version.manifest, VersionStatus.BAD, reason),
                warning("version-bad", **detail, reason=reason),
            )
        good = (*shelf.good, version)
        library = library._with(name, replace(shelf, good=good[-KEPT_VERSIONS:], candidate=None))
        return library, (
            SaveVersion(version.document, version.manifest, VersionStatus.GOOD),
            *(ForgetVersion(old.sha256) for old in good[:-KEPT_VERSIONS]),
            note("version-good", **detail),
            Announce(library.serving()),
        )
    return library, ()
