"""Publishing the client itself: bundles become a signed release, which rollouts bring to the devices."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from aggregator.fleet.authority import Authority
from aggregator.records import Version
from aggregator.refusals import NoSuch
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import NOBODY, PublishRefused, check_signature
from aggregator.repository import Conflict, Writer
from protocol.client_bundle import UnusableBundle, described
from protocol.client_release import CLIENT, RELEASE_KIND, ClientRelease


def release_from(bundles: Sequence[bytes]) -> ClientRelease:
    """What a release of these bundles says; every file in them is checked.

    Raises:
        PublishRefused: one is damaged, or they are not of one version with one bundle a system.
    """
    found = []
    for number, content in enumerate(bundles, 1):
        try:
            found.append(described(io.BytesIO(content)))
        except UnusableBundle as error:
            raise PublishRefused(f"bundle {number}: {error}") from error
    versions = sorted({version for version, _ in found})
    if len(versions) != 1:
        raise PublishRefused(f"the bundles are of {len(versions)} versions: {', '.join(versions) or 'none'}")
    try:
        by_target = sorted((bundle for _, bundle in found), key=lambda bundle: bundle.target)
        return ClientRelease(version=versions[0], bundles=tuple(by_target))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise PublishRefused(f"the bundles are no release: {first['msg']}") from error


def publish_release(
    writer: Writer,
    store: ArtefactStore,
    authority: Authority,
    release: ClientRelease,
    *,
    bundles: Sequence[bytes],
    now: float,
    signature: bytes | None = None,
    publishers: Mapping[str, Ed25519PublicKey] = NOBODY,
) -> Version:
    """Stores a release and signs it; no device has it before a rollout.

    Args:
        writer: the transaction.
        store: takes the bundles, which are durable before the release is known.
        authority: signs it.
        release: of these bundles, by `release_from`.
        bundles: the files.
        now: seconds since 1970.
        signature: JSON of the SignedDocument around the release, by its publisher.
        publishers: whose signature counts, by key id; with any of them, a release without one is refused.

    Raises:
        PublishRefused: it says what to do.
    """
    if signature is not None or publishers:
        check_signature(RELEASE_KIND, release.to_bytes(), signature, publishers)
    document = authority.sign_release(release)
    version = Version(
        model=CLIENT,
        version=release.number,
        manifest_sha256=document.digest.hex(),
        document=document.model_dump_json().encode(),
        created_at=now,
        round_id=None,
    )
    for content in bundles:
        store.put(content)
    try:
        writer.add_version(version)
    except Conflict as error:
        raise PublishRefused(
            f"the client {release.version} is published already, and stays as it is: raise its version"
        ) from error
    return version


def check_model(name: str) -> None:
    """Refuses the client where a model is asked for.

    Raises:
        NoSuch: it is no model.
    """
    if name == CLIENT:
        raise NoSuch(f"{CLIENT} is the client of the devices and no model: see `covey client`")
