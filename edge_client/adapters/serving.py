"""Everybody who is answered while the client runs, as `[predict]` in `edge.toml` says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_client.adapters.predict_socket import PredictSocket
from edge_client.configuration import PredictMqtt, PredictSettings
from edge_client.local import Predictor
from edge_client.prediction import MAX_EXAMPLES, PredictionService

if TYPE_CHECKING:
    from edge_client.adapters.local_broker import LocalBroker


class _Server(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...


def _at_broker(settings: PredictMqtt, answer: Callable[[bytes], bytes]) -> LocalBroker:
    """A connection that answers `<topic>/request` on `<topic>/answer`."""
    from edge_client.adapters.local_broker import LocalBroker

    def heard(_: str, request: bytes) -> None:
        broker.publish(f"{settings.topic}/answer", answer(request))

    broker = LocalBroker(settings, [f"{settings.topic}/request"], heard)
    return broker


class PredictionServers:
    """Socket and broker over one predictor: a version is in memory once."""

    def __init__(self, settings: PredictSettings, state: Path) -> None:
        """Prepares the servers.

        Raises:
            InvalidConfiguration: password or CA of the broker cannot be read.
        """
        self._service = PredictionService(Predictor(state, at_most=MAX_EXAMPLES).predict)
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        if settings.socket is not None:
            self._servers.append(PredictSocket(Path(settings.socket), self._answer, group=settings.group))
        if settings.mqtt is not None:
            self._servers.append(_at_broker(settings.mqtt, self._answer))

    def start(self) -> None:
        """Answers from now on.

        Raises:
            InvalidConfiguration, StorageError: the socket cannot be made.
        """
        for server in self._servers:
            server.start()

    def stop(self) -> None:
        """Answers nobody any more."""
        for server in self._servers:
            server.stop()

    def _answer(self, request: bytes) -> bytes:
        with self._lock:
            return self._service.answer(request)
