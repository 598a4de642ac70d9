"""`/events`: what happens, as it happens; `/health` and `/ready`: for whoever watches the service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from aggregator.access.roles import Role
from aggregator.access.tokens import InvalidToken
from aggregator.repository import RepositoryError
from aggregator.web import schemas
from aggregator.web.admission import By, authenticate, guarded
from aggregator.web.context import context_of
from aggregator.web.problems import ApiProblem

looking = guarded(Role.VIEWER, tag="events")
anybody = APIRouter(tags=["health"])

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@looking.get("/events", name="listen", responses=_STREAM, response_class=StreamingResponse)
async def listen(
    by: By,
    request: Request,
    last_event_id: Annotated[str | None, Header(max_length=40, description="Of the last one seen.")] = None,
) -> StreamingResponse:
    """Server-Sent Events: `device`, `version`, `campaign`, `round`.

    Begins with `hello`, or with `reset` when events since `Last-Event-ID` are gone: read again what you show.
    """
    context = context_of(request)

    def valid() -> bool:
        try:
            return authenticate(request, context).role.allows(Role.VIEWER)
        except (InvalidToken, ApiProblem, RepositoryError):
            return False

    return StreamingResponse(
        context.feed.stream(last_event_id, valid),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@anybody.get("/health", name="show-health")
def show_health(request: Request) -> schemas.Health:
    """Whether the service runs. For a supervisor: restart it when this does not answer."""
    return _health(request, "alive")


@anybody.get("/ready", name="show-readiness", responses={503: {"model": schemas.Health}})
def show_readiness(request: Request, response: Response) -> schemas.Health:
    """Whether the service can work: storage answers, the broker is connected, the main loop turns.

    `trouble` says why it cannot: the disk is full or read-only, the database or the object store is away.
    """
    health = _health(request, "ready")
    if health.storage and health.broker and health.loop and not health.trouble:
        return health
    response.status_code = 503
    return health.model_copy(update={"status": "not-ready"})


def _health(request: Request, status: str) -> schemas.Health:
    context = context_of(request)
    vitals = None if context.vitals is None else context.vitals()
    try:
        with context.operator.repository.read() as reader:
            reader.token("")
        storage = True
    except RepositoryError:
        storage = False
    return schemas.Health.model_validate(
        {
            "status": status,
            "storage": storage,
            "broker": vitals is not None and vitals.broker,
            "loop": vitals is not None and vitals.loop,
            "trouble": "" if vitals is None else vitals.trouble,
        }
    )
