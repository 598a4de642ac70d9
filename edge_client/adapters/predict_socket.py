"""A Unix socket for predictions: a line of JSON in, a line of JSON out, for the members of a group.

One thread serves all connections in turns. Whatever a connection does, it costs the others no more than one
request, and memory stays bounded: by the number of connections, by the length of a line, and because nothing
more is read from a program that does not take its answers.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edge_client.adapters.files import storage_errors
from edge_client.configuration import InvalidConfiguration
from edge_client.prediction import MAX_REQUEST_BYTES, refusal

MAX_CONNECTIONS = 16
UNFINISHED_SECONDS = 10.0
"""How long the rest of a line, or the taking of an answer, may take."""
_READ_BYTES = 65_536
_MODE = 0o660
_LOG = logging.getLogger("covey.edge.predict")


class _Connection:
    """One program's."""

    def __init__(self, peer: socket.socket, now: float) -> None:
        self.peer, self.since = peer, now
        self.unread, self.unsent = bytearray(), bytearray()
        self.ending = False

    @property
    def events(self) -> int:
        """What it waits for: to be rid of an answer, else another request."""
        return selectors.EVENT_WRITE if self.unsent else selectors.EVENT_READ

    @property
    def ready(self) -> bool:
        """Whether there is a request to answer now."""
        return not self.unsent and b"\n" in self.unread

    @property
    def unfinished(self) -> bool:
        """Whether it owes the rest of a line, or has not taken its answer."""
        return bool(self.unread or self.unsent)


class PredictSocket:
    """The server. `start` and `stop` once."""

    def __init__(self, path: Path, answer: Callable[[bytes], bytes], *, group: str | None = None) -> None:
        """Describes a server.

        Args:
            path: of the socket; its directory is made, for the group, when it is not there.
            answer: takes a request and returns its answer, both without a line break; never raises.
            group: who may ask beside this user; this process's own group by default.
        """
        self._path, self._answer, self._group = path, answer, group
        self._connections: dict[socket.socket, _Connection] = {}

    def start(self) -> None:
        """Listens, and serves from now on.

        Raises:
            InvalidConfiguration: there is no such group, this process may not give the socket to it, or the
                path is taken.
            StorageError: the socket cannot be made.
        """
        self._listener = self._listen()
        self._inode = self._path.stat().st_ino
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="covey-predict", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends all connections, and takes the socket away."""
        self._wake.send(b"x")
        self._thread.join(timeout=5.0)
        self._wake.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            with storage_errors(f"making the socket {self._path}"):
                self._make_directory()
                self._remove_leftover()
                listener.bind(os.fspath(self._path))
                self._give(self._path, _MODE)
                listener.listen(MAX_CONNECTIONS)
                listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    def _make_directory(self) -> None:
        directory = self._path.parent
        if not directory.is_dir():
            directory.mkdir(mode=0o700)
            self._give(directory, 0o750)

    def _give(self, path: Path, mode: int) -> None:
        if self._group is not None:
            try:
                os.chown(path, -1, grp.getgrnam(self._group).gr_gid)
            except KeyError:
                raise InvalidConfiguration(f"predict.group: there is no group {self._group}") from None
            except PermissionError:
                raise InvalidConfiguration(
                    f"predict.group: the client is no member of {self._group}: it cannot give it the socket"
                ) from None
        path.chmod(mode)

    def _remove_leftover(self) -> None:
        """Removes the socket of a process that was killed, and nothing else."""
        if not self._path.exists():
            return
        if not self._path.is_socket():
            raise InvalidConfiguration(f"predict.socket: {self._path} is no socket, and stays")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(os.fspath(self._path)) != errno.ECONNREFUSED:
                raise InvalidConfiguration(f"predict.socket: another process listens at {self._path}")
        self._path.unlink()

    # --- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                # A program may have sent several requests at once: each has its turn, after all others'.
                ready = {each.peer: each for each in self._connections.values() if each.ready}
                for key, _ in self._selector.select(timeout=0.0 if ready else 1.0):
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        ready[key.data.peer] = key.data
                for connection in ready.values():
                    self._serve(connection)
                self._drop_slow()
        except Exception:
            _LOG.exception("predict-socket-ended")
        finally:
            for connection in list(self._connections.values()):
                self._close(connection)
            for each in (self._listener, self._woken, self._selector):
                each.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        connection = _Connection(peer, time.monotonic())
        if len(self._connections) >= MAX_CONNECTIONS:
            with contextlib.suppress(OSError):
                peer.send(refusal("busy", f"{MAX_CONNECTIONS} programs are connected already") + b"\n")
            peer.close()
            return
        self._connections[peer] = connection
        self._selector.register(peer, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection) -> None:
        """Does one step for a connection: sends what it is owed, or reads, and answers at most one line."""
        try:
            if connection.unsent:
                sent = connection.peer.send(connection.unsent)
                del connection.unsent[:sent]
            elif not connection.ready:
                data = connection.peer.recv(_READ_BYTES)
                connection.ending = not data
                if not connection.unread:
                    connection.since = time.monotonic()
                connection.unread += data
            if not connection.unsent:
                self._answer_next(connection)
                self._push(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        if connection.ending and not connection.unsent and not connection.ready:
            self._close(connection)
        else:
            self._selector.modify(connection.peer, connection.events, connection)

    def _answer_next(self, connection: _Connection) -> None:
        end = connection.unread.find(b"\n")
        if end > MAX_REQUEST_BYTES or (end < 0 and len(connection.unread) > MAX_REQUEST_BYTES):
            # Where the next request begins, only its sender knows.
            connection.unread.clear()
            connection.unsent += (
                refusal("too-large", f"a request has at most {MAX_REQUEST_BYTES} bytes") + b"\n"
            )
            connection.ending = True
        elif end >= 0:
            request = bytes(connection.unread[:end])
            del connection.unread[: end + 1]
            if request.strip():
                connection.unsent += self._answer(request) + b"\n"
            connection.since = time.monotonic()

    def _push(self, connection: _Connection) -> None:
        if connection.unsent:
            sent = connection.peer.send(connection.unsent)
            del connection.unsent[:sent]

    def _drop_slow(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if connection.unfinished and now - connection.since > UNFINISHED_SECONDS:
                self._close(connection)

    def _close(self, connection: _Connection) -> None:
        self._connections.pop(connection.peer, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.peer)
        connection.peer.close()
