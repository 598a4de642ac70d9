"""Around every page: what a browser may do with it, and problems as pages."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.web.console.rendering import content
from aggregator.web.problems import MEDIA_TYPE
from aggregator.web.schemas import PREFIX, Problem
from aggregator.web.sessions import SESSION_COOKIE

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        # The style sheet holds small pictures of its own.
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Shell:
    """Adds the headers of a page to whatever is not the API's, and shows its problems as pages."""

    def __init__(self, app: ASGIApp, owner: FastAPI) -> None:
        """Wraps an application.

        Args:
            app: what answers.
            owner: the whole, which knows the context.
        """
        self._app = app
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http" or scope["path"].startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        request = Request({**scope, "app": self._owner})
        held: Message | None = None
        body = b""

        async def dressed(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                if headers.get("content-type") == MEDIA_TYPE and _wants_page(request):
                    held = message
                    return
            elif held is not None:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    response = await _page_of(request, Problem.model_validate(json.loads(body)))
                    for name, value in _HEADERS.items():
                        response.headers.setdefault(name, value)
                    response.headers.setdefault("Cache-Control", "no-store")
                    await response(scope, receive, send)
                return
            await send(message)

        await self._app(scope, receive, dressed)


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "") or "hx-request" in request.headers


async def _page_of(request: Request, problem: Problem) -> Response:
    path = request.url.path
    if problem.code == "unauthenticated" and request.method == "GET" and not path.startswith("/auth/"):
        live = "hx-request" in request.headers
        headers = {"HX-Redirect": "/sign-in"}
        response = Response(status_code=401, headers=headers) if live else RedirectResponse("/sign-in", 303)
        if SESSION_COOKIE in request.cookies:
            # It is over. A browser that went on to show it would seem to guess.
            response.delete_cookie(SESSION_COOKIE)
        return response
    html = await run_in_threadpool(content, request, "problem.html", None, problem=problem)
    return HTMLResponse(html, problem.status)
