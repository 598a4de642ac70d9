"""Which version this device is to have: signed assignments, taken once and in order. Pure.

What comes from the network is believed when a model signer of the fleet has signed it, for this device or for
all, with a sequence above every one taken before. A version that is here already is served at once; another
is fetched and tested first, and until then nothing changes for anybody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_client.durable import SaveStanding, SaveVersion, VersionStatus
from edge_client.events import Stamp
from edge_client.library import Library, Ready, Shelf, Standing, Version, placed
from edge_client.models import fetch, forget, open_manifest, serve
from edge_client.outputs import FindBlob, Outputs, note, warning
from edge_client.profile import Profile
from protocol.errors import MalformedMessage
from protocol.messages import MAX_MODELS, ModelAnnouncement
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment


@dataclass(frozen=True)
class Told:
    """A verified announcement."""

    assignment: VersionAssignment
    version: Version | None
    save: SaveStanding


def verified(profile: Profile, message: ModelAnnouncement) -> Told:
    """Verifies an announcement.

    Raises:
        BadSignature: no model signer of this device signed both parts.
        InvalidManifest: what they signed is no manifest.
        MalformedMessage: no assignment, for another device or fleet, or its parts do not belong together.
    """
    assignment = open_assignment(profile, message)
    version = None
    if assignment.version is not None:
        if message.manifest is None:
            raise MalformedMessage("the manifest of the assigned version is missing")
        version = open_manifest(message.manifest, profile.model_signers)
        found = (version.manifest.name, version.manifest.version, version.sha256)
        if found != (assignment.model, assignment.version, assignment.manifest_sha256):
            raise MalformedMessage("the manifest is not that of the assigned version")
    manifest = message.manifest if version is not None else None
    return Told(assignment, version, SaveStanding(assignment, message.assignment, manifest))


def open_assignment(profile: Profile, message: ModelAnnouncement) -> VersionAssignment:
    """Verifies what an announcement says that this device is to have.

    Raises:
        BadSignature: no model signer of this device signed it.
        MalformedMessage: it is no assignment, or for another device or fleet.
    """
    payload = message.assignment.open(ASSIGNMENT_KIND, dict(profile.model_signers))
    assignment = VersionAssignment.from_bytes(payload)
    if assignment.fleet != profile.fleet or assignment.device not in (None, profile.device_id):
        raise MalformedMessage(f"it is for {assignment.device or 'the devices'} of {assignment.fleet}")
    return assignment


def assigned(library: Library, told: Told, stamp: Stamp) -> tuple[Library, Outputs]:
    """Takes in what this device is told to have."""
    assignment, name = told.assignment, told.assignment.model
    shelf = library.shelf(name)
    if name not in library.shelves and len(library.shelves) >= MAX_MODELS:
        # A status has no room for more, and the disk has its limits, too.
        return library, (warning("too-many-models", model=name, held=len(library.shelves)),)
    before = shelf.fleet if assignment.device is None else shelf.own
    if before is not None and assignment.sequence <= before.sequence:
        if assignment.sequence == before.sequence and _digest(before.version) == _digest(told.version):
            return library, ()  # retained, so it comes again with every connection
        detail = {"sequence": assignment.sequence, "taken": before.sequence}
        return library, (warning("assignment-not-newer", model=name, **detail),)
    shelf = placed(shelf, assignment, Standing(assignment.sequence, told.version))
    wanted, serving = shelf.wanted, shelf.serving
    library = library.with_shelf(name, shelf)
    if wanted is not None and serving is not None and not assignment.rollback:
        detail = {"version": wanted.manifest.version, "serving": serving.manifest.version}
        if detail["version"] < detail["serving"]:
            # Taken note of, so that it does not come again; but nobody has signed the way back.
            dropped = shelf.candidate.version if shelf.candidate is not None else None
            shelf = replace(shelf, candidate=None)
            refused = warning("older-without-roll-back", model=name, **detail)
            return library.with_shelf(name, shelf), (told.save, *forget(shelf, dropped), refused)
    library, outputs = _pursue(library, name, wanted, stamp)
    return library, (told.save, *outputs)


def _digest(version: Version | None) -> str:
    return "" if version is None else version.sha256


def _pursue(library: Library, name: str, wanted: Version | None, stamp: Stamp) -> tuple[Library, Outputs]:
    """Goes for a version: serves it if it is here, else fetches it."""
    shelf = library.shelf(name)
    if wanted is None:
        return library, ()
    candidate = shelf.candidate.version if shelf.candidate is not None else None
    if candidate is not None and candidate.sha256 == wanted.sha256:
        return library, ()
    if wanted.sha256 in shelf.bad:
        return library, (note("version-known-bad", model=name, version=wanted.manifest.version),)
    shelf = replace(shelf, candidate=None)
    dropped = forget(shelf, candidate)
    here = (*shelf.good, *((shelf.base.version,) if isinstance(shelf.base, Ready) else ()))
    if shelf.serving is not None and shelf.serving.sha256 == wanted.sha256:
        return library.with_shelf(name, shelf), dropped
    if any(version.sha256 == wanted.sha256 for version in here):
        library, outputs = serve(library.with_shelf(name, shelf), name, wanted)
        return library, (*dropped, *outputs)
    if shelf.base is not None and shelf.base.version.sha256 == wanted.sha256:
        # On its way for a round already.
        shelf = replace(shelf, candidate=shelf.base, base=None)  # type: ignore[arg-type]
        started: Outputs = ()
    else:
        fetching = fetch(wanted, stamp)
        shelf, started = replace(shelf, candidate=fetching), (FindBlob(fetching.todo[0]),)
    return library.with_shelf(name, shelf), (
        *dropped,
        SaveVersion(wanted.document, wanted.manifest, VersionStatus.CANDIDATE),
        note("version-announced", model=name, version=wanted.manifest.version),
        *started,
    )


def offered(library: Library, version: Version, stamp: Stamp) -> tuple[Library, Outputs]:
    """A round that this device takes part in is about a version that is not here: fetch it, unserved."""
    name = version.manifest.name
    shelf: Shelf = library.shelf(name)
    if library.find(name, version.sha256) is not None or version.sha256 in shelf.bad:
        return library, ()
    before = shelf.base.version if shelf.base is not None else None
    fetching = fetch(version, stamp)
    shelf = replace(shelf, base=fetching)
    return library.with_shelf(name, shelf), (
        *forget(shelf, before),
        SaveVersion(version.document, version.manifest, VersionStatus.BASE),
        note("base-offered", model=name, version=version.manifest.version),
        FindBlob(fetching.todo[0]),
    )
