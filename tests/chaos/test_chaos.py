"""Real devices on a bad network, with all going wrong at once; benchmarks/chaos.py is the long form."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from benchmarks.chaos import GROUPS, HEALING_SECONDS, run, schedule
from deploy.broker import find_mosquitto
from tests.faulty_network import FaultProxy, bad_links

SECONDS, DEVICES = 60.0, 6


@pytest.mark.chaos
@pytest.mark.timeout(60 + SECONDS + 4 * HEALING_SECONDS)
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_nothing_is_lost_and_nobody_gets_stuck() -> None:
    result = run(SECONDS, DEVICES, 2, lambda now: None)
    assert result["problems"] == []
    assert result["completed"], "a storm in which nothing works shows nothing"
    assert result["last_round_devices"] == DEVICES


def test_what_goes_wrong_ends_in_time() -> None:
    faults = schedule(600.0, 20, np.random.default_rng(7))
    partitioned = [0] * GROUPS
    for fault in faults:
        if fault.kind in ("partition", "heal"):
            partitioned[fault.index] += 1 if fault.kind == "partition" else -1
    assert partitioned == [0] * GROUPS
    assert faults[-1].at <= 600.0
    assert {fault.kind for fault in faults} >= {"partition", "reset", "restart broker", "kill device"}
    assert all(fault.at < 300.0 for fault in faults if fault.kind == "kill aggregator")


@contextmanager
def echo() -> Iterator[int]:
    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=server.accept()[:1], daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(65_536):
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_the_proxy_delays_holds_back_and_resets() -> None:
    with (
        echo() as port,
        FaultProxy("127.0.0.1", ("127.0.0.1", port), delay=0.1) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
    ):
        begin = time.monotonic()
        message = os.urandom(300_000)
        client.sendall(message)
        heard = b""
        while len(heard) < len(message):
            heard += client.recv(65_536)
        assert heard == message
        assert time.monotonic() - begin >= 0.2
        proxy.partitioned = True
        client.sendall(b"lost?")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        proxy.partitioned = False
        assert client.recv(5) == b"lost?"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_links_without_rights_are_proxies() -> None:
    with echo() as port, bad_links(port, 2, host="localhost", latency=0, loss=0, rate="1mbit") as links:
        for group in links:
            assert group.prefix == ()
            with socket.create_connection(("127.0.0.1", group.proxy.port), timeout=10) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
