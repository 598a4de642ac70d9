"""Signs a client bundle as an update that devices of a fleet take."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.bundle.build import Target
from edge_client import __version__
from protocol.client_release import RELEASE_KIND, ClientBundle, ClientRelease
from protocol.identity import SignedDocument


def sign_bundle(bundle: Path, target: Target, key: Ed25519PrivateKey, version: str = __version__) -> Path:
    """Writes the signed release of a bundle beside it.

    Args:
        bundle: made by `build_bundle`.
        target: the system that it is for.
        key: one that the fleet's devices take models from.
        version: of the client in it.

    Returns:
        BUNDLE.release.json.
    """
    content = bundle.read_bytes()
    described = ClientBundle(
        target=target.name, sha256=hashlib.sha256(content).hexdigest(), size=len(content)
    )
    release = ClientRelease(version=version, bundles=(described,))
    out = bundle.with_name(f"{bundle.name}.release.json")
    out.write_text(SignedDocument.create(key, RELEASE_KIND, release.to_bytes()).model_dump_json() + "\n")
    return out
