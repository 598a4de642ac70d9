"""Publishing from a browser: the files of an exported folder, as `covey model publish` would send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import File, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.registry.publishing import FILES, SIGNATURE_FILE, PublishRefused
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import Field, ask
from aggregator.web.limits import CONSOLE_UPLOAD
from aggregator.web.model_routes import published

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")


@asking.get("/models/publish", name="ask-publish-version", response_class=HTMLResponse)
def ask_publish(by: By, request: Request) -> Response:
    """Asks for the files of a model."""
    signed = bool(by.operator.publishers)
    needed = ", ".join(FILES) + (f" and {SIGNATURE_FILE}" if signed else "")
    return ask(
        request,
        by,
        "Publish a model",
        "It becomes the next version of its name. Every device fetches it at once; where promotion is "
        "manual, those that a rollout brings it to. "
        + (
            "This fleet takes signed models only: on the machine with your key, "
            "`covey model sign DIR --sign-key KEY` writes the signature into the folder."
            if signed
            else "The service checks the files against the manifest, and signs that."
        ),
        action=CONSOLE_UPLOAD,
        fields=(
            Field(
                "files",
                "The files of the exported folder",
                kind="file",
                required=True,
                note=f"{needed}, chosen together. Others in the folder do no harm.",
            ),
        ),
        button="Publish",
        back="/models",
    )


@acting.post(CONSOLE_UPLOAD, name="publish-version")
def publish(by: By, files: Annotated[list[UploadFile], File()]) -> Response:
    """Publishes a model as its next version."""
    found = by_name(files)
    manifest, graph, weights = (found[name] for name in FILES)
    published(by, manifest, graph, weights, found.get(SIGNATURE_FILE))
    return RedirectResponse("/models", 303)


def by_name(files: Sequence[UploadFile]) -> dict[str, UploadFile]:
    """The files that make a model, by name.

    Raises:
        PublishRefused: one is missing, or there twice.
    """
    found: dict[str, UploadFile] = {}
    others = []
    for file in files:
        # Some browsers send a path.
        name = (file.filename or "").replace("\\", "/").rpartition("/")[2]
        if name in found:
            raise PublishRefused(f"there are two files {name}: choose those of one folder")
        if name in (*FILES, SIGNATURE_FILE):
            found[name] = file
        elif name:
            others.append(name)
    missing = [name for name in FILES if name not in found]
    if missing:
        beside = f"; {', '.join(sorted(others)[:5])[:200]}: not a file of a model" if others else ""
        raise PublishRefused(
            f"{' and '.join(missing)} missing: choose all files of the folder together{beside}"
        )
    return found
