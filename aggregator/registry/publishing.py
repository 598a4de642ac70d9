"""Publishing: a model's files become a signed version with a number of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from aggregator.fleet.authority import Authority
from aggregator.records import Version
from aggregator.registry.artefacts import ArtefactStore
from aggregator.repository import Reader, Writer
from models.manifest import InvalidManifest, ModelManifest
from protocol.client_release import CLIENT, ClientRelease
from protocol.errors import BadSignature
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.plan import MODEL_KIND

FILES: Final = ("manifest.json", "model.tflite", "weights.bin")
"""Of an exported folder: manifest, graph, weights."""
SIGNATURE_FILE: Final = "signature.json"
"""The publisher's, beside them, where a fleet takes signed models only."""
NOBODY: Final[Mapping[str, Ed25519PublicKey]] = MappingProxyType({})


class PublishRefused(Exception):
    """Files that are no version, or a wrong moment for one; the message says what to do."""


class UnknownSigner(PublishRefused):
    """A manifest with a signature that counts for nothing here."""


def publish(
    writer: Writer,
    store: ArtefactStore,
    authority: Authority,
    *,
    manifest: bytes,
    graph: bytes,
    weights: bytes,
    now: float,
    signature: bytes | None = None,
    publishers: Mapping[str, Ed25519PublicKey] = NOBODY,
) -> Version:
    """Checks, numbers, signs and records a model.

    Args:
        manifest: as the exporter wrote it; its version number is replaced by the next free one.
        graph: the model's graph.
        weights: its weights file.
        now: seconds since 1970.
        signature: JSON of the SignedDocument around `manifest`, by its publisher.
        publishers: whose signature counts, by key id; with any of them, a model without one is refused.

    Raises:
        PublishRefused: it says what to do.
    """
    if signature is not None or publishers:
        check_signature(MODEL_KIND, manifest, signature, publishers)
    try:
        exported = ModelManifest.from_bytes(manifest)
    except InvalidManifest as error:
        raise PublishRefused(f"manifest.json is not valid ({error}): export the model again") from error
    if exported.name == CLIENT:
        raise PublishRefused(f"{CLIENT} is what the client is called: give the model another name")
    for what, ref, data in (("graph", exported.graph, graph), ("weights", exported.weights, weights)):
        if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
            raise PublishRefused(
                f"the {what} file is not the one that manifest.json names: export the model again"
            )
    if any(round_.model == exported.name for round_ in writer.rounds(status="running")):
        # Its result would come after this version and replace it, without a trace of it in the weights.
        raise PublishRefused(
            f"a round of {exported.name} is running: publish when it has ended (`covey round status`)"
        )
    newest = writer.newest_version(exported.name)
    number = 1 if newest is None else newest.version + 1
    return record(
        writer,
        store,
        authority,
        ModelManifest.model_validate(dict(exported) | {"version": number}),
        artefacts=(graph, weights),
        now=now,
        round_id=None,
    )


def check_signature(
    kind: str, content: bytes, signature: bytes | None, publishers: Mapping[str, Ed25519PublicKey]
) -> None:
    """Checks that a publisher has signed what is to be published.

    Raises:
        UnknownSigner: nobody whose signature counts has.
        PublishRefused: the signature is none, or of something else.
    """
    if signature is None:
        raise UnknownSigner(
            "this fleet takes only what a publisher signed: sign a model with `covey model sign`, or publish "
            "with --sign-key"
        )
    try:
        document = SignedDocument.model_validate_json(signature)
        payload = document.open(kind, dict(publishers))
    except ValidationError as error:
        raise PublishRefused("the signature is no signed document: sign it again") from error
    except BadSignature as error:
        raise UnknownSigner(f"{error}: name its key among the `publishers` in aggregator.json") from error
    if payload != content:
        raise PublishRefused("the signature is of something else: sign it again")


def record(
    writer: Writer,
    store: ArtefactStore,
    authority: Authority,
    manifest: ModelManifest,
    *,
    artefacts: tuple[bytes, ...],
    now: float,
    round_id: str | None,
) -> Version:
    """Stores what a version needs, signs it and adds it; it is published when the transaction commits.

    The files are durable before: a version that the repository knows can always be read.
    """
    version, document = sign(authority, manifest, now=now, round_id=round_id)
    for data in artefacts:
        store.put(data)
    store.put_manifest(manifest, document)
    writer.add_version(version)
    return version


def sign(
    authority: Authority, manifest: ModelManifest, *, now: float, round_id: str | None
) -> tuple[Version, SignedDocument]:
    """Signs a manifest; returns its record and the document in it."""
    document = authority.sign_manifest(manifest)
    version = Version(
        model=manifest.name,
        version=manifest.version,
        manifest_sha256=manifest.sha256(),
        document=document.model_dump_json().encode(),
        created_at=now,
        round_id=round_id,
    )
    return version, document


def document_of(version: Version) -> SignedDocument:
    """The signed document in a version's record."""
    return SignedDocument.model_validate_json(version.document)


def manifest_of(version: Version) -> ModelManifest:
    """The manifest in a version's record, which this aggregator has signed itself."""
    return ModelManifest.from_bytes(document_of(version).payload)


def release_of(version: Version) -> ClientRelease:
    """The release in the record of a version of the client."""
    return ClientRelease.from_bytes(document_of(version).payload)


def blobs_of(version: Version) -> tuple[BlobRef, ...]:
    """The artefacts of a version, of a model or of the client."""
    if version.model == CLIENT:
        return tuple(bundle.blob for bundle in release_of(version).bundles)
    manifest = manifest_of(version)
    return manifest.graph, manifest.weights


def artefacts_of(reader: Reader) -> dict[BlobRef, str]:
    """Every artefact that a device may ask for, with the name of a model that needs it."""
    return {blob: version.model for version in reader.versions() for blob in blobs_of(version)}
