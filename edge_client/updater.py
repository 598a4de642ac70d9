"""`covey-update`: the small program of root that changes the client; the client itself cannot.

Systemd starts it when an update lies in /var/lib/covey/updates, and at a boot that finds a trial not ended.
It runs from the last good version, so that a broken new one can always be taken back.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from edge_client.adapters.systemd import SystemdService
from edge_client.adapters.versions import UnusableBundle, Versions, take
from edge_client.updating import Service, UpdateRefused, settle, update
from protocol.client_release import RELEASE_KIND, ClientRelease
from protocol.enrolment import EnrolmentBundle
from protocol.errors import ProtocolError
from protocol.identity import SignedDocument

FOLDER = Path("/opt/covey")
STATE = Path("/var/lib/covey")
TRUST = Path("/etc/covey/enrolment.json")
"""Root's own copy of whom this device obeys: the client could change the one in its state."""
BUNDLE, RELEASE, READY = "bundle.tar.xz", "release.json", "ready"
_MAX_RELEASE_BYTES = 131_072
_LOG = logging.getLogger("covey.update")


def run(
    folder: Path, inbox: Path, signers: Mapping[str, Ed25519PublicKey], target: str, service: Service
) -> str:
    """Ends what was begun, then takes the update that lies in the inbox, if there is one.

    Args:
        folder: of the installed clients.
        inbox: where the client puts updates; "ready" is written last.
        signers: who may sign releases, by key id.
        target: the system that this device runs.
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
    document, bundle = folder / ".incoming.json", folder / ".incoming.tar.xz"
    try:
        _, size = take(inbox / RELEASE, document)
        if size > _MAX_RELEASE_BYTES:
            raise UpdateRefused("the release is larger than any release")
        try:
            signed = SignedDocument.model_validate_json(document.read_bytes())
            release = ClientRelease.from_bytes(signed.open(RELEASE_KIND, dict(signers)))
        except (ValidationError, ProtocolError) as error:
            raise UpdateRefused(f"the release is not the operator's: {error}") from error
        if release.version == version:
            return version  # a power cut came between its trial and the end of this
        if release.target != target:
            raise UpdateRefused(f"this device runs {target}, the bundle is for {release.target}")
        if take(inbox / BUNDLE, bundle) != (release.sha256, release.size):
            raise UnusableBundle("the bundle is not the one that the operator signed")
        return update(store, service, release, bundle)
    finally:
        # Either way it is done with: the same update would fail the same way at every boot.
        (inbox / READY).unlink(missing_ok=True)
        document.unlink(missing_ok=True)
        bundle.unlink(missing_ok=True)


def main() -> int:
    """The program; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        signers = EnrolmentBundle.from_bytes(TRUST.read_bytes()).model_keys()
        target = Path(__file__).resolve().parents[2] / "bundle.json"
        version = run(FOLDER, STATE / "updates", signers, _target(target), SystemdService(STATE))
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
