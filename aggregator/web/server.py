"""Where the API listens: an address, a certificate, and a thread of its own.

A thread, not the main loop's: the round loop is synchronous and waits for disk and for sums; on one loop with
it, each would stall the other. They meet in the repository's transactions and nowhere else.
"""

from __future__ import annotations

import logging
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI

from aggregator.web.context import context_of_app
from aggregator.web.listen import CannotListen, ListenAddress

STOP_SECONDS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files of the server's certificate and its key."""

    certificate: Path
    key: Path


class ApiServer:
    """Serves an application from its own thread while the block lasts.

    Example:
        with ApiServer(create_app(context), ListenAddress.parse("127.0.0.1:0")) as server:
            print(server.url)
    """

    def __init__(self, app: FastAPI, address: ListenAddress, files: CertificateFiles | None = None) -> None:
        """Binds the address.

        Raises:
            CannotListen: it is taken, is not of this machine, or wants a certificate.
        """
        if address.tls and files is None:
            raise CannotListen("https needs a certificate")
        self._app = app
        self._address = address
        try:
            self._socket = socket.create_server(
                (address.host, address.port),
                family=socket.AF_INET6 if ":" in address.host else socket.AF_INET,
                backlog=512,
            )
        except OSError as error:
            where = f"{address.host}:{address.port}"
            raise CannotListen(
                f"cannot listen at {where} ({error.strerror}): choose another place with --listen"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                # Whoever speaks to this port is who connects to it: nobody else's word on it counts.
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
                h11_max_incomplete_event_size=64 * 1024,
                ssl_certfile=files.certificate if address.tls and files else None,
                ssl_keyfile=files.key if address.tls and files else None,
            )
        )
        self._thread = threading.Thread(target=self._run, name="covey-api", daemon=True)

    @property
    def url(self) -> str:
        """Where to reach it from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._address.host, self._address.host)  # noqa: S104
        scheme = "https" if self._address.tls else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> Self:
        """Begins to serve; connections wait in the socket's queue until it does."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends live streams, lets requests finish, and stops."""
        context_of_app(self._app).feed.close()
        self._server.should_exit = True
        self._thread.join(timeout=2 * STOP_SECONDS)
        self._socket.close()
