"""The application: `create_app(context)`: the API, and the console for people."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.telemetry.metered import MeteredApi
from aggregator.web import (
    access_routes,
    client_routes,
    enrolment_routes,
    event_routes,
    fleet_routes,
    lifecycle_routes,
    login_routes,
    metrics_routes,
    model_routes,
    problems,
    rollout_routes,
    round_routes,
)
from aggregator.web.console import (
    assets,
    campaigns,
    devices,
    pages,
    pinning,
    publishing,
    querying,
    rollouts,
    tokens,
)
from aggregator.web.console.shell import Shell
from aggregator.web.context import Context
from aggregator.web.limits import BodyLimit
from aggregator.web.schemas import PREFIX, Problem
from aggregator.web.specification import as_text

DESCRIPTION = """\
Everything that `covey` commands do, over HTTP. Errors are problems by RFC 9457 with a stable `code`. Lists
come in pages: give `next` as `cursor` for the following one. A `GET` that brings back an `ETag` as
`If-None-Match` is answered by 304 when nothing has changed.
"""


def create_app(context: Context) -> FastAPI:
    """Makes the application of one aggregator."""
    app = _Specified(
        title="Covey aggregator",
        version=version("covey"),
        description=DESCRIPTION,
        openapi_url=f"{PREFIX}/openapi.json",
        # The pages that FastAPI offers load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.covey = context
    api = APIRouter(prefix=PREFIX, responses={500: {"model": Problem, "description": "the service stumbled"}})
    for router in (
        fleet_routes.looking,
        fleet_routes.acting,
        lifecycle_routes.acting,
        enrolment_routes.acting,
        enrolment_routes.anybody,
        model_routes.looking,
        model_routes.acting,
        round_routes.looking,
        round_routes.acting,
        client_routes.looking,
        client_routes.acting,
        rollout_routes.looking,
        rollout_routes.acting,
        access_routes.looking,
        access_routes.managing,
        event_routes.looking,
        event_routes.anybody,
    ):
        api.include_router(router)
    app.include_router(api)
    app.include_router(login_routes.router)
    app.include_router(metrics_routes.looking)
    for router in (
        pages.looking,
        pages.anybody,
        devices.asking,
        devices.acting,
        campaigns.asking,
        campaigns.acting,
        rollouts.asking,
        rollouts.acting,
        publishing.asking,
        publishing.acting,
        querying.asking,
        querying.acting,
        tokens.managing,
        pinning.asking,
        pinning.acting,
        assets.router,
    ):
        app.include_router(router, include_in_schema=False)
    problems.install(app)
    app.add_middleware(EntityTags)
    app.add_middleware(Shell, owner=app)
    app.add_middleware(BodyLimit, limits=context.limits)
    if context.metrics is not None:
        app.add_middleware(MeteredApi, metrics=context.metrics)
    return app


class _Specified(FastAPI):
    """An application whose specification is about what travels."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = as_text(super().openapi())
        return self.openapi_schema


class EntityTags:
    """Answers of the API carry an ETag by content; who has that content already is told so by 304."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on; the body of a JSON answer is held until it is whole."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        known = Headers(scope=scope).get("if-none-match")
        start: Message = {}
        body: list[bytes] = []

        async def tagged(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "private, no-cache")
                headers["X-Content-Type-Options"] = "nosniff"
                json = headers.get("content-type", "") == "application/json"
                if scope["method"] == "GET" and message["status"] == 200 and json:
                    start = message
                    return
            elif start and message["type"] == "http.response.body":
                body.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                whole = b"".join(body)
                tag = f'"{hashlib.sha256(whole).hexdigest()[:32]}"'
                headers = MutableHeaders(scope=start)
                headers["ETag"] = tag
                if known is not None and tag in known:
                    del headers["content-length"], headers["content-type"]
                    start["status"], whole = 304, b""
                await send(start)
                await send({"type": "http.response.body", "body": whole})
                return
            await send(message)

        await self._app(scope, receive, tagged)
