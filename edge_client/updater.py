"""`covey-update`: the small program of root that changes the client; the client itself cannot.

Systemd starts it when an update lies in /var/lib/covey/updates, and at a boot that finds a trial not ended.
It runs from the last good version, so that a broken new one can always be taken back.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from edge_client.adapters.systemd import SystemdService
from edge_client.adapters.versions import Versions, take
from edge_client.installed import (
    ASSIGNMENTS,
    BUNDLE,
    READY,
    RELEASE,
    Audience,
    Outcome,
    audience,
    may_go_back,
    wanted,
)
from edge_client.updating import Service, UpdateRefused, settle, update
from protocol.client_bundle import UnusableBundle
from protocol.client_release import CLIENT, MAX_RELEASE_BYTES, RELEASE_KIND, ClientRelease
from protocol.enrolment import EnrolmentBundle
from protocol.errors import ProtocolError
from protocol.identity import SignedDocument
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment

FOLDER = Path("/opt/covey")
STATE = Path("/var/lib/covey")
TRUST = Path("/etc/covey/enrolment.json")
"""Root's own copy of whom this device obeys: the client could change the one in its state."""
_DOCUMENTS: TypeAdapter[tuple[SignedDocument, ...]] = TypeAdapter(tuple[SignedDocument, ...])
_LOG = logging.getLogger("covey.update")


@dataclass(frozen=True)
class Trust:
    """Whom this device obeys, and what it is.

    Attributes:
        signers: who may sign releases and assignments, by key id.
        fleet, device_id: as enrolled.
        target: the system that this device runs.
    """

    signers: Mapping[str, Ed25519PublicKey]
    fleet: str
    device_id: str
    target: str


def run(folder: Path, inbox: Path, trust: Trust, service: Service) -> str:
    """Ends what was begun, then takes the update that lies in the inbox, if there is one.

    Args:
        folder: of the installed clients.
        inbox: where the client puts updates; "ready" is written last.
        trust: whom this device obeys.
        service: the client's service.

    Returns:
        The version that runs now.

    Raises:
        UpdateRefused, UnusableBundle: the update is not taken; what ran before runs.
    """
    store = Versions(folder)
    version = settle(store, service)
    if not (inbox / READY).exists():
        return version
    asked = Outcome("", "")
    try:
        texts = _content(inbox / ASSIGNMENTS, folder) if (inbox / ASSIGNMENTS).exists() else b""
        asked = Outcome("", hashlib.sha256(texts).hexdigest() if texts else "")
        offer = _offer(_content(inbox / RELEASE, folder), texts, trust)
        asked = replace(asked, version=offer.release.version)
        if offer.release.version != version:
            version = _take(store, service, offer, trust.target, inbox / BUNDLE, folder / ".incoming.tar.xz")
        # Else a power cut came between its trial and the end of this.
        failed = "" if version == offer.release.version else "it did not stay up"
        store.note_outcome(replace(asked, reason=failed))
        return version
    except (UpdateRefused, UnusableBundle) as error:
        store.note_outcome(replace(asked, reason=str(error)))
        raise
    finally:
        # Either way it is done with: the same update would fail the same way at every boot.
        (inbox / READY).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Offer:
    """What lies ready, verified but for its bundle.

    Attributes:
        digest: of the release's document, hexadecimal.
        assigned: what this device was told to have, as far as that lies there, too.
    """

    release: ClientRelease
    digest: str
    assigned: Mapping[Audience, VersionAssignment]


def _offer(content: bytes, texts: bytes, trust: Trust) -> _Offer:
    try:
        document = SignedDocument.model_validate_json(content)
        release = ClientRelease.from_bytes(document.open(RELEASE_KIND, dict(trust.signers)))
    except ValidationError as error:
        raise UpdateRefused("the release is not the operator's: no signed document") from error
    except ProtocolError as error:
        raise UpdateRefused(f"the release is not the operator's: {error}") from error
    return _Offer(release, document.digest.hex(), _assigned(texts, trust) if texts else {})


def _take(store: Versions, service: Service, offer: _Offer, target: str, source: Path, copy: Path) -> str:
    """Installs what is offered; the bundle at `source` is looked at as a `copy` that only root can change."""
    release = offer.release
    bundle = release.bundle_for(target)
    if bundle is None:
        systems = ", ".join(each.target for each in release.bundles)
        raise UpdateRefused(f"this device runs {target}, the release is for {systems}")
    try:
        missing = release.version not in store.installed()
        if missing and take(source, copy) != (bundle.sha256, bundle.size):
            raise UnusableBundle("the bundle is not the one that the operator signed")
        return update(store, service, release, copy, back=_goes_back(store, offer))
    finally:
        copy.unlink(missing_ok=True)


def _assigned(texts: bytes, trust: Trust) -> dict[Audience, VersionAssignment]:
    """What this device was told to have, as one of the fleet and by itself."""
    try:
        documents = _DOCUMENTS.validate_json(texts)
        told = [
            VersionAssignment.from_bytes(document.open(ASSIGNMENT_KIND, dict(trust.signers)))
            for document in documents
        ]
    except (ValidationError, ProtocolError) as error:
        raise UpdateRefused(f"the assignments are not the operator's: {error}") from error
    for each in told:
        mine = each.fleet == trust.fleet and each.device in (None, trust.device_id)
        if not mine or each.model != CLIENT:
            raise UpdateRefused("an assignment is of another device, fleet or model")
    return {audience(each): each for each in told}


def _goes_back(store: Versions, offer: _Offer) -> bool:
    """Whether this device is to have this release even where it is older; notes what it was told.

    Raises:
        UpdateRefused: it was told something newer before: nobody brings an old assignment back.
    """
    told = wanted(offer.assigned)
    if told is None or told.manifest_sha256 != offer.digest:
        return False  # they are of another update
    for each, taken in store.sequences().items():
        presented = offer.assigned.get(each)
        if presented is None or presented.sequence < taken:
            raise UpdateRefused(f"an assignment is older than {taken}, which was taken before")
    for each, assignment in offer.assigned.items():
        store.note_sequence(each, assignment.sequence)
    return may_go_back(offer.assigned)


def _content(source: Path, folder: Path) -> bytes:
    copy = folder / ".incoming.json"
    try:
        _, size = take(source, copy)
        if size > MAX_RELEASE_BYTES:
            raise UpdateRefused(f"{source.name} is larger than any")
        return copy.read_bytes()
    finally:
        copy.unlink(missing_ok=True)


def main() -> int:
    """The program; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        enrolled = EnrolmentBundle.from_bytes(TRUST.read_bytes())
        target = _target(Path(__file__).resolve().parents[2] / "bundle.json")
        trust = Trust(enrolled.model_keys(), enrolled.fleet, enrolled.device_id, target)
        version = run(FOLDER, STATE / "updates", trust, SystemdService(STATE))
    except (UpdateRefused, UnusableBundle) as error:
        _LOG.error("the update was not taken: %s", error)
        return 1
    except (OSError, ProtocolError) as error:
        _LOG.error("%s", error)
        return 1
    _LOG.info("the client is %s", version)
    return 0


def _target(description: Path) -> str:
    import json

    return str(json.loads(description.read_text())["target"])


if __name__ == "__main__":
    sys.exit(main())
