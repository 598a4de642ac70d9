"""Versions of models on this device: fetched, tested, served, and kept to fall back on. Pure.

    wanted --signed assignment--> Fetching --all blobs whole--> Testing --ran--> good (served from then on)
                                                                   |
                                                                   +--cannot run--> bad (never fetched again)

The two versions served last are kept: one is served, the other is what the device falls back to by itself. A
candidate changes nothing for anybody until it is good, and becoming good is one row in one transaction. Which
version is wanted is the matter of `edge_client.standing`. A round may be about a version that nobody is to be
served yet: that one is fetched and tested beside, as the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_client.durable import ForgetVersion, SaveVersion, StoreChunk, VersionStatus
from edge_client.events import BlobFound, Fault, Stamp, VersionTested
from edge_client.library import (
    ASK_AGAIN_SECONDS,
    Fetching,
    Library,
    Ready,
    Shelf,
    Testing,
    Version,
    blamed,
    served,
)
from edge_client.outputs import Announce, FindBlob, Output, Outputs, Send, TestVersion, note, warning
from models.manifest import ModelManifest
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk, BlobNeed
from protocol.plan import MODEL_KIND
from protocol.transfer import Reception

MAX_ASK_AGAIN_SECONDS = 60.0
TEST_AGAIN_SECONDS = 60.0


def resume(library: Library) -> Outputs:
    """Looks on the disk for the files of what was under way, at the start of a process."""
    return tuple(
        FindBlob(each.todo[0])
        for shelf in library.shelves.values()
        for _, each in shelf.under_way()
        if isinstance(each, Fetching)
    )


def open_manifest(document: SignedDocument, signers: Mapping[str, Ed25519PublicKey]) -> Version:
    """Verifies a signed manifest.

    Raises:
        BadSignature: nobody of the `signers` signed it.
        InvalidManifest: what they signed is no manifest.
    """
    payload = document.open(MODEL_KIND, dict(signers))
    return Version(document, ModelManifest.from_bytes(payload))


def fetch(version: Version, stamp: Stamp) -> Fetching:
    """A version whose files are to be looked for; `FindBlob` of its first blob goes with it."""
    return Fetching(version, version.blobs, ask_at=stamp.steady + ASK_AGAIN_SECONDS)


def forget(shelf: Shelf, *versions: Version | None) -> tuple[ForgetVersion, ...]:
    """Forgets those of these versions that are not on the shelf any more."""
    known = {version.sha256 for version in shelf.known} | shelf.bad.keys()
    return tuple(ForgetVersion(v.sha256) for v in versions if v is not None and v.sha256 not in known)


def serve(library: Library, name: str, version: Version) -> tuple[Library, Outputs]:
    """Serves a version that runs, from now on."""
    before = library.shelf(name)
    shelf = served(before, version)
    if shelf.candidate is not None and shelf.candidate.version.sha256 == version.sha256:
        shelf = replace(shelf, candidate=None)
    if shelf.base is not None and shelf.base.version.sha256 == version.sha256:
        shelf = replace(shelf, base=None)
    library = library.with_shelf(name, shelf)
    return library, (
        SaveVersion(version.document, version.manifest, VersionStatus.GOOD),
        *forget(shelf, *before.good),
        note("version-good", model=name, version=version.manifest.version),
        Announce(library.serving(), library.failures()),
    )


def failed(library: Library, name: str, version: Version, fault: Fault) -> tuple[Library, Outputs]:
    """A version does not run here, or does not any more: it is never fetched again.

    One that was served gives way to the one before. Where there is none, nothing is served until another
    version comes: what crashes the program that asks it is worse than no answer.
    """
    reason = f"{fault.code}: {fault.detail}"
    shelf = blamed(library.shelf(name), version, reason)
    shelf = replace(shelf, good=tuple(other for other in shelf.good if other.sha256 != version.sha256))
    if shelf.candidate is not None and shelf.candidate.version.sha256 == version.sha256:
        shelf = replace(shelf, candidate=None)
    if shelf.base is not None and shelf.base.version.sha256 == version.sha256:
        shelf = replace(shelf, base=None)
    library = library.with_shelf(name, shelf)
    detail = {"model": name, "version": version.manifest.version, "reason": reason}
    if shelf.serving is None:
        detail["serving"] = "none"
    return library, (
        SaveVersion(version.document, version.manifest, VersionStatus.BAD, reason),
        warning("version-bad", **detail),
        Announce(library.serving(), library.failures()),
    )


def blob_found(library: Library, event: BlobFound, stamp: Stamp) -> tuple[Library, Outputs]:
    """The disk was looked at for a blob: fetch what lacks, go on to the next, or test the version."""
    outputs: list[Output] = []
    for name, shelf in library.shelves.items():
        for place, fetching in shelf.under_way():
            if not isinstance(fetching, Fetching) or fetching.todo[0] != event.blob:
                continue
            following, more = _advance(library, fetching, event, stamp)
            shelf = shelf.moved(place, following)
            library = _charged(library, more, stamp)
            outputs.extend(more)
        library = library.with_shelf(name, shelf)
    return library, tuple(outputs)


def _charged(library: Library, outputs: Outputs, stamp: Stamp) -> Library:
    """The library after what is asked for was taken off the download limit."""
    asked = sum(
        len(output.message.indices)
        for output in outputs
        if isinstance(output, Send) and isinstance(output.message, BlobNeed)
    )
    return library.spent(asked, stamp.steady)


def _advance(
    library: Library, candidate: Fetching, event: BlobFound, stamp: Stamp
) -> tuple[Fetching | Testing, Outputs]:
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
            return waiting, (warning("download-corrupt", blob=event.blob.sha256[:16], retry_s=patience),)
        return _ask(library, candidate, reception, stamp)
    todo = candidate.todo[1:]
    if todo:
        following = Fetching(version, todo, ask_at=stamp.steady + ASK_AGAIN_SECONDS)
        return following, (FindBlob(todo[0]),)
    return Testing(version), (TestVersion(version.sha256, version.manifest),)


def _ask(
    library: Library, candidate: Fetching, reception: Reception, stamp: Stamp, *, again: bool = False
) -> tuple[Fetching, Outputs]:
    reception, need = reception.ask(again=again, most=library.affords(stamp.steady))
    patience = min(2 * candidate.patience, MAX_ASK_AGAIN_SECONDS) if again else ASK_AGAIN_SECONDS
    candidate = replace(candidate, reception=reception, ask_at=stamp.steady + patience, patience=patience)
    return candidate, (Send(need),) if need else ()


def chunk_received(
    library: Library, chunk: BlobChunk, body: bytes | memoryview, stamp: Stamp
) -> tuple[Library, Outputs]:
    """A chunk came: store it if something under way lacks it, and ask for the next."""
    for name, shelf in library.shelves.items():
        for place, fetching in shelf.under_way():
            if not isinstance(fetching, Fetching) or fetching.reception is None:
                continue
            if fetching.reception.blob != chunk.blob or chunk.index not in fetching.reception.missing:
                continue
            reception = fetching.reception.store(chunk.index)
            outputs: Outputs
            stored = StoreChunk(chunk.blob, chunk.index, body)
            if reception.complete:
                fetching, outputs = replace(fetching, reception=reception), (FindBlob(chunk.blob),)
            else:
                fetching, outputs = _ask(library, fetching, reception, stamp)
                library = _charged(library, outputs, stamp)
            return library.with_shelf(name, shelf.moved(place, fetching)), (stored, *outputs)
    return library, ()


def ticked(library: Library, stamp: Stamp, *, hurry: bool = False) -> tuple[Library, Outputs]:
    """Asks again for what did not come; `hurry` after a reconnect, when requests may have been lost."""
    outputs: list[Output] = []
    for name, shelf in library.shelves.items():
        changed = shelf
        for place, each in shelf.under_way():
            following, more = _ticked(library, each, stamp, hurry=hurry)
            library = _charged(library, more, stamp)
            outputs.extend(more)
            changed = changed.moved(place, following)
        library = library.with_shelf(name, changed)
    return library, tuple(outputs)


def _ticked(
    library: Library, each: Fetching | Testing, stamp: Stamp, *, hurry: bool
) -> tuple[Fetching | Testing, Outputs]:
    if isinstance(each, Fetching) and (hurry or stamp.steady >= each.ask_at):
        if each.reception is None or each.reception.complete:
            later = replace(each, ask_at=stamp.steady + MAX_ASK_AGAIN_SECONDS)
            return later, (FindBlob(each.todo[0]),)
        return _ask(library, each, each.reception, stamp, again=True)
    if isinstance(each, Fetching) and library.download is not None and each.reception is not None:
        # What the limit held back: without one, the window is always full.
        reception, need = each.reception.ask(most=library.affords(stamp.steady))
        if need is not None:
            ask_at = stamp.steady + ASK_AGAIN_SECONDS
            return replace(each, reception=reception, ask_at=ask_at), (Send(need),)
    if isinstance(each, Testing) and each.test_at is not None and stamp.steady >= each.test_at:
        version = each.version
        return Testing(version), (TestVersion(version.sha256, version.manifest),)
    return each, ()


def tested(library: Library, event: VersionTested, stamp: Stamp) -> tuple[Library, Outputs]:
    """A version ran, or did not: serve it, keep it for rounds, or remember it as bad."""
    for name, shelf in library.shelves.items():
        for place, each in shelf.under_way():
            if not isinstance(each, Testing) or each.version.sha256 != event.sha256:
                continue
            version, fault = each.version, event.fault
            if fault is not None and fault.transient:
                later = replace(each, test_at=stamp.steady + TEST_AGAIN_SECONDS)
                detail = {"model": name, "version": version.manifest.version}
                return library.with_shelf(name, shelf.moved(place, later)), (
                    warning("version-not-tested", **detail, code=fault.code, reason=fault.detail),
                )
            if fault is not None:
                return failed(library, name, version, fault)
            if place == "candidate":
                return serve(library, name, version)
            return library.with_shelf(name, shelf.moved(place, Ready(version))), (
                note("base-ready", model=name, version=version.manifest.version),
            )
    return library, ()
