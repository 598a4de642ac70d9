"""The API without a server: requests go straight to the application, in this process."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import httpx
from fastapi import FastAPI

ADDRESS = ("local", 0)
URL = "http://localhost"


class InProcess(httpx.BaseTransport):
    """Carries requests of a synchronous client to an application; a stream of events is not for it."""

    def __init__(self, app: FastAPI, *, client: tuple[str, int] = ADDRESS) -> None:
        """Prepares the transport.

        Args:
            app: the application.
            client: address and port that the requests seem to come from.
        """
        self._asgi = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=client)
        self._runner = asyncio.Runner()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answers one request."""

        async def answer() -> httpx.Response:
            response = await self._asgi.handle_async_request(
                httpx.Request(request.method, request.url, headers=request.headers, stream=_Async(request))
            )
            content = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=content)

        return self._runner.run(answer())

    def __enter__(self) -> Self:
        """Begins a block at whose end the loop closes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Closes the loop."""
        self.close()

    def close(self) -> None:
        """Closes the loop."""
        self._runner.close()


class _Async(httpx.AsyncByteStream):
    def __init__(self, request: httpx.Request) -> None:
        self._request = request

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        stream = self._request.stream
        assert isinstance(stream, httpx.SyncByteStream)  # noqa: S101 (of a synchronous client)
        for part in stream:
            yield part
