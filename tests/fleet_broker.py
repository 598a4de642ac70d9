"""mosquitto with exactly the configuration that `covey aggregator init` wrote, as a user of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from deploy.broker import find_mosquitto


class FleetBroker:
    """The broker of a state directory.

    Root's mosquitto takes another user's rights before it reads anything: the directory becomes that user's.
    """

    def __init__(self, state: Path, port: int) -> None:
        self.host, self.port = "localhost", port
        self.url = f"mqtts://localhost:{port}"
        self.directory = state / "broker"
        self.log_file = state.parent / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert find_mosquitto() is not None
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            self.adopt()
            user = pwd.getpwnam("nobody")
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(["/bin/sh", "start"], cwd=self.directory, stderr=log, **identity)
        deadline = time.monotonic() + 120
        while True:
            assert self._process.poll() is None, self.log_file.read_text()
            if self.listens():
                return
            assert time.monotonic() < deadline, self.log_file.read_text()
            time.sleep(0.02)

    def listens(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def adopt(self) -> None:
        """Gives the broker's user what the service wrote, which is the same user outside of tests by root."""
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            for path in (self.directory, *self.directory.rglob("*")):
                with contextlib.suppress(FileNotFoundError):
                    os.chown(path, user.pw_uid, user.pw_gid)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=120)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Peer:
    """A client of the broker that tries things.

    Attributes:
        heard: (topic, payload) of what was delivered to it.
        reason: why it was not let in, or is not connected any more.
    """

    def __init__(
        self,
        broker: FleetBroker,
        context: ssl.SSLContext,
        client_id: str,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.reason = ""
        self._answered = threading.Event()
        self._done: set[int] = set()
        self._broker = broker
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.tls_set_context(context)
        self._client.on_message = lambda _, __, message: self.heard.append((message.topic, message.payload))
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = lambda _, __, mid, *___: self._done.add(mid)
        self._client.on_subscribe = self._on_subscribe
        self._granted = True
        if will is not None:
            self._client.will_set(*will, qos=1, retain=True)

    def _on_connect(self, _: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
        self.reason = str(reason) if reason.is_failure else ""
        self._answered.set()

    def _on_subscribe(self, _: Any, __: Any, mid: int, reasons: Any, ___: Any) -> None:
        self._granted = not any(reason.is_failure for reason in reasons)
        self._done.add(mid)

    def _on_disconnect(self, _: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
        self.reason = f"disconnected: {reason}"
        self._answered.set()

    @property
    def connected(self) -> bool:
        # paho does not count a broker that says goodbye first.
        return self._client.is_connected() and not self.reason

    def connect(self) -> bool:
        """Whether the broker let it in."""
        self._client.connect(self._broker.host, self._broker.port)
        self._client.loop_start()
        assert self._answered.wait(120)
        return not self.reason

    def subscribe(self, topic: str) -> bool:
        """Whether the broker says that it will deliver."""
        mid = self._client.subscribe(topic, 1)[1]
        self._wait(mid)  # type: ignore[arg-type]
        return self._granted

    def drop(self) -> None:
        """Goes without a word, so that the will is due."""
        self._client.socket().close()  # type: ignore[union-attr]

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Returns when the broker acknowledged it, which it does for what it drops, too."""
        self._wait(self._client.publish(topic, payload, qos=1, retain=retain).mid)

    def _wait(self, mid: int) -> None:
        deadline = time.monotonic() + 120
        while mid not in self._done:
            assert time.monotonic() < deadline, (mid, self.reason, self._broker.log_file.read_text())
            time.sleep(0.005)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()
