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

from edge_client import pulling
from edge_client.durable import ForgetVersion, SaveVersion, VersionStatus
from edge_client.events import BlobFound, Fault, Stamp, VersionTested
from edge_client.library import (
    Fetching,
    Library,
    Ready,
    Shelf,
    Testing,
    Version,
    blamed,
    served,
)
from edge_client.outputs import Announce, FindBlob, Output, Outputs, TestVersion, note, warning
from models.manifest import ModelManifest
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk
from protocol.plan import MODEL_KIND

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
    ask_at = stamp.steady + pulling.ASK_AGAIN_SECONDS
    return Fetching(version=version, todo=version.blobs, ask_at=ask_at)


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
            following, more = pulling.found(fetching, event, library.affords(stamp.steady), stamp)
            library = library.charged(more, stamp.steady)
            version = fetching.version
            if following is None:
                more = (*more, TestVersion(version.sha256, version.manifest))
            shelf = shelf.moved(place, following or Testing(version))
            outputs.extend(more)
        library = library.with_shelf(name, shelf)
    return library, tuple(outputs)


def chunk_received(
    library: Library, chunk: BlobChunk, body: bytes | memoryview, stamp: Stamp
) -> tuple[Library, Outputs]:
    """A chunk came: store it if something under way lacks it, and ask for the next."""
    for name, shelf in library.shelves.items():
        for place, fetching in shelf.under_way():
            if not isinstance(fetching, Fetching):
                continue
            step = pulling.arrived(fetching, chunk, body, library.affords(stamp.steady), stamp)
            if step is None:
                continue
            library = library.charged(step[1], stamp.steady)
            return library.with_shelf(name, shelf.moved(place, step[0])), step[1]
    return library, ()


def ticked(library: Library, stamp: Stamp, *, hurry: bool = False) -> tuple[Library, Outputs]:
    """Asks again for what did not come; `hurry` after a reconnect, when requests may have been lost."""
    outputs: list[Output] = []
    for name, shelf in library.shelves.items():
        changed = shelf
        for place, each in shelf.under_way():
            following, more = _ticked(library, each, stamp, hurry=hurry)
            library = library.charged(more, stamp.steady)
            outputs.extend(more)
            changed = changed.moved(place, following)
        library = library.with_shelf(name, changed)
    return library, tuple(outputs)


def _ticked(
    library: Library, each: Fetching | Testing, stamp: Stamp, *, hurry: bool
) -> tuple[Fetching | Testing, Outputs]:
    if isinstance(each, Fetching):
        most, limited = library.affords(stamp.steady), library.download is not None
        return pulling.ticked(each, most, stamp, limited=limited, hurry=hurry)
    if each.test_at is not None and stamp.steady >= each.test_at:
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
