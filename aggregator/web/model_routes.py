"""`/versions` and `/models`: what is published."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import File, Path, Query, Response, UploadFile

from aggregator import records
from aggregator.access.roles import Role
from aggregator.registry.publishing import document_of
from aggregator.rounds.evaluation import VersionEvaluation
from aggregator.web import schemas
from aggregator.web.admission import Admitted, By, guarded
from aggregator.web.fleet_routes import SLUG
from aggregator.web.problems import documented
from protocol.identity import SignedDocument

looking = guarded(Role.VIEWER, tag="models")
acting = guarded(Role.OPERATOR, tag="models")

Model = Annotated[str, Path(pattern=SLUG, description="Name of a model.")]
Number = Annotated[int, Path(ge=1, lt=2**31, description="Number of the version.")]
Cursor = Annotated[
    str | None, Query(pattern=SLUG[:-1] + r":[1-9][0-9]{0,9}$", description="From a page before.")
]
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


@looking.get("/versions", name="list-versions")
def list_versions(
    by: By,
    model: Annotated[str | None, Query(pattern=SLUG, description="Only of this model.")] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> schemas.Page[schemas.Version]:
    """Published versions, by model and number."""
    name, _, number = (cursor or ":0").partition(":")
    after = (name, int(number))
    found = [v for v in by.operator.versions(model) if (v.model, v.version) > after]
    items = tuple(schemas.Version.of(version) for version in found[:limit])
    last = items[-1] if len(found) > limit else None
    return schemas.Page(items=items, next=None if last is None else f"{last.model}:{last.version}")


@acting.post(
    "/versions",
    name="publish-version",
    status_code=201,
    responses=documented("publish-refused", "unknown-signer", "conflict"),
)
def publish_version(
    by: By,
    manifest: Annotated[UploadFile, File(description="manifest.json")],
    graph: Annotated[UploadFile, File(description="model.tflite")],
    weights: Annotated[UploadFile, File(description="weights.bin")],
    signature: Annotated[
        UploadFile | None, File(description="SignedDocument around the manifest, by its publisher")
    ] = None,
) -> schemas.Version:
    """Publishes a model as its next version: checks its files, signs its manifest."""
    return schemas.Version.of(published(by, manifest, graph, weights, signature))


def published(
    by: Admitted,
    manifest: UploadFile,
    graph: UploadFile,
    weights: UploadFile,
    signature: UploadFile | None,
) -> records.Version:
    """Publishes what was uploaded, in somebody's name; the audit log has the manifest's hash.

    Raises:
        PublishRefused: it says what to do.
    """
    document = manifest.file.read()
    return by.to(f"manifest {hashlib.sha256(document).hexdigest()[:16]}").publish(
        document,
        graph.file.read(),
        weights.file.read(),
        None if signature is None else signature.file.read(),
    )


@looking.get("/models/{model}/evaluations", name="list-evaluations")
def list_evaluations(
    by: By,
    model: Model,
    version: Annotated[int | None, Query(ge=1, lt=2**31, description="Only of this version.")] = None,
) -> schemas.Page[VersionEvaluation]:
    """How versions did on the devices, newest first."""
    return schemas.Page(items=by.operator.evaluations(model, version)[::-1])


@looking.get("/models/{model}/versions/{version}/manifest", name="download-manifest")
def download_manifest(by: By, model: Model, version: Number) -> SignedDocument:
    """The signed manifest of a version: what a device checks it by."""
    return document_of(by.operator.version(model, version))


@looking.get("/models/{model}/versions/{version}/graph", name="download-graph", responses=_BYTES)
def download_graph(by: By, model: Model, version: Number) -> Response:
    """The graph of a version: `model.tflite`."""
    return Response(by.operator.model(model, version).graph, media_type="application/octet-stream")


@looking.get("/models/{model}/versions/{version}/weights", name="download-weights", responses=_BYTES)
def download_weights(by: By, model: Model, version: Number) -> Response:
    """The weights of a version: `weights.bin`."""
    return Response(by.operator.model(model, version).weights, media_type="application/octet-stream")
