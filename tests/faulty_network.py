"""A bad network between devices and their broker: latency and partitions by a proxy, loss by the kernel.

The proxy needs no rights. With root, every group of devices has a network namespace of its own, whose link
has a rate limit and loses packets in both directions (netem is no part of every kernel; a token bucket and a
packet filter are).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

HOST_ADDRESS = "10.77.0.1"
"""What devices in namespaces call this machine."""
_READ = 65_536


class FaultProxy:
    """A TCP proxy that delays, holds back and resets what passes; a thread runs it, any thread may break it.

    Attributes:
        delay: seconds that every byte is under way, in each direction.
        partitioned: nothing passes, and nobody is told: connections are taken and stay silent, as behind a
            router that lost its uplink.
    """

    def __init__(self, host: str, target: tuple[str, int], *, delay: float = 0.0) -> None:
        self.delay, self.partitioned = delay, False
        self._host, self._target = host, target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        start = asyncio.start_server(self._serve, self._host, 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Resets every connection."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in tuple(self._writers):
            if writer.is_closing():
                continue
            connection = writer.transport.get_extra_info("socket")
            # Without waiting for what is unsent, the kernel ends it by RST instead of FIN: socket(7).
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        self._abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        onward = None
        try:
            await self._while_partitioned()
            source, onward = await asyncio.open_connection(*self._target)
            self._writers.add(onward)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, onward))
                both.create_task(self._pass_on(source, writer))
        except* OSError:
            pass  # one end is gone, and with it the other
        except* asyncio.CancelledError:
            pass
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes keep their order and their distance; the queue is what is under way."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def arrive() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._while_partitioned()
                if not data:
                    raise ConnectionResetError
                writer.write(data)
                await writer.drain()

        arriving = asyncio.create_task(arrive())
        try:
            while data := await reader.read(_READ):
                await under_way.put((self._loop.time() + self.delay, data))
                if arriving.done():
                    break
            await under_way.put((self._loop.time() + self.delay, b""))
            await arriving
        finally:
            arriving.cancel()

    async def _while_partitioned(self) -> None:
        while self.partitioned:
            await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Group:
    """Devices behind one bad link.

    Attributes:
        proxy: their way to the broker.
        url: what they call the broker.
        prefix: put in front of a command, it runs in their network.
    """

    proxy: FaultProxy
    url: str
    prefix: tuple[str, ...] = ()


def can_make_namespaces() -> bool:
    """Whether links of their own can be made here: root, and the programs for it."""
    programs = all(shutil.which(name) is not None for name in ("ip", "tc", "nft"))
    if not programs or os.geteuid() != 0:
        return False
    probe = ["ip", "netns", "exec", "covey-probe", "nft", "list", "ruleset"]
    with suppress(subprocess.CalledProcessError):
        _run("ip", "netns", "add", "covey-probe")
        try:
            _run(*probe)
            return True
        finally:
            _run("ip", "netns", "del", "covey-probe")
    return False


@contextmanager
def bad_links(
    port: int, groups: int, *, host: str, latency: float, loss: float, rate: str
) -> Iterator[Sequence[Group]]:
    """Groups of devices that reach a broker of this machine by bad links.

    Args:
        port: of the broker, on `host`.
        groups: how many.
        host: HOST_ADDRESS puts every group into a namespace of its own; `localhost` leaves them here, with
            neither loss nor rate limit.
        latency: seconds of a way there and back.
        loss: share of the packets that is lost, in each direction.
        rate: of each link, as `tc` writes it: `2mbit`.
    """
    apart = host == HOST_ADDRESS
    with ExitStack() as stack:
        if apart:
            stack.enter_context(_namespaces(groups, loss, rate))
        made = []
        for number in range(groups):
            proxy = FaultProxy(HOST_ADDRESS if apart else "127.0.0.1", ("localhost", port), delay=latency / 2)
            stack.enter_context(proxy)
            prefix = ("ip", "netns", "exec", _name(number)) if apart else ()
            made.append(Group(proxy, f"mqtts://{host}:{proxy.port}", prefix))
        yield made


def _name(number: int) -> str:
    return f"covey-{os.getpid()}-{number}"


@contextmanager
def _namespaces(groups: int, loss: float, rate: str) -> Iterator[None]:
    with ExitStack() as stack:
        # Addresses are this machine's: of two at a time, neither would reach anybody.
        alone = stack.enter_context((Path(tempfile.gettempdir()) / "covey-namespaces.lock").open("w"))
        fcntl.flock(alone, fcntl.LOCK_EX)
        for number in range(groups):
            name, outside = _name(number), f"cv{os.getpid() % 10**6}-{number}"
            _run("ip", "netns", "add", name)
            # A namespace takes its end of the pair with it, and so the pair.
            stack.callback(_run, "ip", "netns", "del", name)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "wan", "netns", name)
            _run("ip", "addr", "add", f"10.77.{number + 1}.1/24", "dev", outside)
            if number == 0:
                _run("ip", "addr", "add", f"{HOST_ADDRESS}/32", "dev", outside)
            _run("ip", "link", "set", outside, "up")
            _run("ip", "-n", name, "addr", "add", f"10.77.{number + 1}.2/24", "dev", "wan")
            for device in ("lo", "wan"):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "-n", name, "route", "add", "default", "via", f"10.77.{number + 1}.1")
            limit = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
            _run("tc", "qdisc", "add", "dev", outside, *limit)
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "wan", *limit)
            drop = f"numgen random mod 1000 < {round(1000 * loss)} drop"
            hooks = "".join(
                f"chain {hook} {{\n type filter hook {hook} priority 0;\n {drop}\n}}\n"
                for hook in ("input", "output")
            )
            _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=f"table inet lossy {{\n{hooks}}}\n")
        yield


def _run(*command: str, stdin: str = "") -> None:
    subprocess.run(command, input=stdin, text=True, check=True, capture_output=True, timeout=20)
