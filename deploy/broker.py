"""A private MQTT broker on the loopback interface, for the demo and the tests: mosquitto, else amqtt.

Nothing here is for production: it takes anonymous clients, so it listens on 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, assert_never

from deploy.demo.processes import ChildProcess, ProcessError, uninterrupted

BrokerKind = Literal["mosquitto", "amqtt"]
BrokerChoice = Literal["auto", "mosquitto", "amqtt"]

_HOST = "127.0.0.1"
_START_ATTEMPTS = 5
_PORTS = range(10_000, 32_768)
"""Below Linux's ephemeral ports, and above those of well-known services."""
# MQTT 3.1.1 section 3.1: CONNECT, clean session, keep-alive 10 s, client id "covey-probe".
_CONNECT = b"\x10\x17\x00\x04MQTT\x04\x02\x00\x0a\x00\x0bcovey-probe"
_CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
_DISCONNECT = b"\xe0\x00"

# Limits are off because a slow subscriber would lose acknowledged messages to them without notice.
# Queues are saved at every change, so that a restart forgets little; nothing relies on it.
# The user is kept: switching it, as root does by default, would cut the tether to the parent.
_MOSQUITTO_CONFIGURATION = """\
listener {port} {host}
allow_anonymous true
user {user}
persistence true
persistence_location {directory}/
autosave_on_changes true
autosave_interval 1
max_queued_messages 0
max_queued_bytes 0
set_tcp_nodelay true
log_dest file {directory}/broker.log
log_type error
log_type warning
log_type notice
"""


class BrokerError(RuntimeError):
    """The broker is not there or does not start."""


def find_mosquitto() -> str | None:
    """Path of the mosquitto program, or None; Debian puts it where only root's PATH looks."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("mosquitto", path=search)


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens, for a server that binds it later, or again.

    It is none of those that the kernel gives to whoever asks for any: a connection of another program could
    hold such a one just when the server starts.
    """
    while not _is_free(port := secrets.choice(_PORTS)):
        pass
    return port


def choose_kind(choice: BrokerChoice = "auto") -> BrokerKind:
    """The broker that `choice` stands for on this machine: mosquitto when it is installed.

    Raises:
        BrokerError: mosquitto is asked for and not installed.
    """
    if choice == "auto":
        return "amqtt" if find_mosquitto() is None else "mosquitto"
    if choice == "mosquitto" and find_mosquitto() is None:
        raise BrokerError("mosquitto is not installed; on Debian: apt-get install mosquitto")
    return choice


class BrokerProcess:
    """A broker in its own process, with its own temporary directory, as a context manager.

    Example:
        with BrokerProcess() as broker:
            client.connect(broker.host, broker.port)
    """

    def __init__(
        self, kind: BrokerChoice = "auto", *, port: int | None = None, start_seconds: float = 60.0
    ) -> None:
        """Describes a broker; entering the context starts it.

        Args:
            kind: which broker; see `choose_kind`.
            port: TCP port on 127.0.0.1; a free one when None.
            start_seconds: how long it may take until it accepts a client.
        """
        self.kind: BrokerKind = choose_kind(kind)
        self.host = _HOST
        self._fixed_port = port
        self._port = port
        self._start_seconds = start_seconds
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        """Starts the broker and waits until it accepts a client."""
        self._files = tempfile.TemporaryDirectory(prefix="covey-broker-")
        try:
            self._start_on_some_port()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the broker and removes its files."""
        self._close()

    @property
    def port(self) -> int:
        """TCP port; it stays the same over restarts."""
        if self._port is None:
            raise BrokerError("the broker has not been started")
        return self._port

    @property
    def url(self) -> str:
        """Address as `--broker` takes it."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running_process().pid

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.running

    @property
    def log(self) -> str:
        """The end of the broker's log."""
        return "" if self._process is None else self._process.log_tail()

    def kill(self) -> None:
        """Ends the broker by SIGKILL, as a power cut would; what it saved to disk stays for `restart`."""
        self._running_process().kill()

    def restart(self) -> None:
        """Starts the broker again on the same port and files, after stopping it when it still runs."""
        self._running_process().stop()
        self._start()

    def _running_process(self) -> ChildProcess:
        if self._process is None:
            raise BrokerError("the broker has not been started")
        return self._process

    def _start_on_some_port(self) -> None:
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._port = free_port() if self._fixed_port is None else self._fixed_port
            self._process = self._make_process(self._port)
            try:
                self._start()
            except BrokerError:
                # Another process may have taken the free port in the meantime.
                if self._fixed_port is not None or attempt == _START_ATTEMPTS or self.running:
                    raise
            else:
                return

    def _start(self) -> None:
        process = self._running_process()
        if not _is_free(self.port):
            raise BrokerError(f"port {self.port} on {self.host} is taken")
        try:
            process.start()
        except ProcessError as error:
            raise BrokerError(str(error)) from error
        deadline = time.monotonic() + self._start_seconds
        while process.running and time.monotonic() < deadline:
            if _accepts_client(self.port):
                return
            time.sleep(0.02)
        state = "does not answer" if process.running else f"ended with code {process.exit_code}"
        raise BrokerError(f"{self.kind} on port {self.port} {state}\n{process.log_tail()}")

    def _make_process(self, port: int) -> ChildProcess:
        if self._files is None:
            raise BrokerError("the broker has not been started")
        directory = Path(self._files.name)
        log = directory / "broker.log"
        match self.kind:
            case "mosquitto":
                configuration = directory / "mosquitto.conf"
                configuration.write_text(
                    _MOSQUITTO_CONFIGURATION.format(
                        host=_HOST, port=port, user=getpass.getuser(), directory=directory
                    )
                )
                return ChildProcess(
                    "mosquitto", [find_mosquitto() or "mosquitto", "-c", configuration], log=log
                )
            case "amqtt":
                argv = [sys.executable, "-P", "-m", "deploy.broker", "--amqtt", "--port", str(port)]
                return ChildProcess("amqtt", argv, log=log)
            case _:
                assert_never(self.kind)

    def _close(self) -> None:
        with uninterrupted():
            if self._process is not None:
                self._process.stop()
            if self._files is not None:
                self._files.cleanup()
                self._files = None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As brokers do: connections of an earlier broker in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _accepts_client(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1.0) as connection:
            connection.sendall(_CONNECT)
            answer = b""
            while len(answer) < len(_CONNACK_ACCEPTED):
                received = connection.recv(len(_CONNACK_ACCEPTED) - len(answer))
                if not received:
                    return False
                answer += received
            connection.sendall(_DISCONNECT)
            return answer == _CONNACK_ACCEPTED
    except OSError:
        return False


async def _serve_amqtt(port: int) -> None:
    # Imported here: only this child process pays for it, and a machine with mosquitto needs no amqtt.
    from amqtt.broker import Broker

    # No plugin but the login of anonymous clients: the default ones log every packet and publish $SYS.
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{_HOST}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await broker.start()
    await stopping.wait()
    await broker.shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Runs the embedded broker in this process until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deploy.broker", description=main.__doc__)
    parser.add_argument("--amqtt", action="store_true", required=True, help="run the embedded broker")
    parser.add_argument("--port", type=int, required=True, help="TCP port on 127.0.0.1")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_amqtt(options.port))


if __name__ == "__main__":
    main()
