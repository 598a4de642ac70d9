"""`/client`: the client that devices run, its releases and its versions."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import File, UploadFile

from aggregator.access.roles import Role
from aggregator.web import client_schemas, schemas
from aggregator.web.admission import By, guarded
from aggregator.web.problems import documented
from protocol.client_release import MAX_BUNDLES

looking = guarded(Role.VIEWER, tag="client")
acting = guarded(Role.OPERATOR, tag="client")


@acting.post(
    "/client/releases",
    name="publish-client",
    status_code=201,
    responses=documented("publish-refused", "unknown-signer"),
)
def publish_client(
    by: By,
    bundle: Annotated[
        list[UploadFile],
        File(description="covey-VERSION-SYSTEM.tar.xz, one for each system", max_length=MAX_BUNDLES),
    ],
    signature: Annotated[
        UploadFile | None, File(description="SignedDocument around the release, by its publisher")
    ] = None,
) -> client_schemas.Release:
    """Publishes a release of the client, which a rollout of `covey-client` brings to the devices."""
    bundles = [each.file.read() for each in bundle]
    digests = " ".join(hashlib.sha256(content).hexdigest()[:16] for content in bundles)
    signed = None if signature is None else signature.file.read()
    return client_schemas.Release.of(by.to(f"bundles {digests}").publish_client(bundles, signed))


@looking.get("/client/releases", name="list-client-releases")
def list_releases(by: By) -> schemas.Page[client_schemas.Release]:
    """Releases of the client, newest first."""
    found = reversed(by.operator.releases())
    return schemas.Page(items=tuple(client_schemas.Release.of(view) for view in found))


@looking.get("/client/versions", name="list-client-versions")
def list_versions(by: By) -> schemas.Page[client_schemas.ClientCount]:
    """How many devices run each version of the client, by version and system."""
    counts = by.operator.client_counts()
    return schemas.Page(items=tuple(client_schemas.ClientCount.of(count) for count in counts))
