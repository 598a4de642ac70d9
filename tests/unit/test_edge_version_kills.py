"""A device is killed before every change that taking a new version makes: it answers, and gets there."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.adapters import blobs
from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.mqtt import Inbound, LinkUp
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.daemon import Daemon
from edge_client.durable import VersionStatus
from edge_client.events import Fault, Started, VersionTested
from edge_client.inbox import Inbox
from edge_client.outputs import TestVersion
from edge_client.profile import Profile
from models.manifest import ModelManifest
from protocol.codec import decode_from_device, encode
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import BlobNeed, DeviceStatus, ModelAnnouncement
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment
from tests.edge_broker import FLEET, Fleet
from tests.edge_fleet import PERMISSIVE, manifest, weights

GRAPHS = {number: bytes([number]) * 65_536 * 5 for number in (1, 2)}
CHANGES = ("pwrite", "replace", "unlink", "fsync", "open")


def model(version: int) -> ModelManifest:
    return manifest(version, graph=GRAPHS[version])


class Aggregator:
    """The device's whole network, and its worker: what it asks for, it gets at once."""

    def __init__(self, fleet: Fleet, bad: frozenset[int] = frozenset()) -> None:
        self.fleet, self.bad, self.chunks = fleet, bad, 0
        files = (*GRAPHS.values(), weights(1), weights(2))
        self.files = {BlobRef.of(data): data for data in files}
        self.statuses: list[DeviceStatus] = []
        self.waiting: list[bytes] = []
        self.inbox = Inbox()

    def start(self) -> None:
        """Connects to nothing."""

    def send(self, channel: str, frame: bytes, *, retain: bool = False) -> bool:
        message = decode_from_device(frame)[0]
        if isinstance(message, DeviceStatus):
            self.statuses.append(message)
        elif isinstance(message, BlobNeed):
            for chunk, body in chunks(message.blob, self.files[message.blob], message.indices):
                self.chunks += 1
                self.waiting.append(encode(chunk, body))
        return True

    def submit(self, job: object) -> None:
        assert isinstance(job, TestVersion)
        fault = Fault("model-unusable", "it does not run") if job.manifest.version in self.bad else None
        self.inbox.put(VersionTested(job.sha256, fault))

    def announcement(self, version: int) -> bytes:
        wanted = model(version)
        assignment = VersionAssignment(
            fleet=FLEET,
            model="watch",
            version=version,
            manifest_sha256=wanted.sha256(),
            sequence=version,
        )
        signer = self.fleet.operator
        return encode(
            ModelAnnouncement(
                assignment=SignedDocument.create(signer, ASSIGNMENT_KIND, assignment.to_bytes()),
                manifest=SignedDocument.create(signer, MODEL_KIND, wanted.to_bytes()),
            )
        )


def take(state: Path, network: Aggregator, version: int, wrap: Callable[[Any], Any] = lambda x: x) -> None:
    """One process of a device, from its start until nothing is left to do."""
    credentials = load_credentials(state)
    with DeviceStore.open(state) as store:
        store._connection = wrap(store._connection)
        data = NpzDirectory(state)
        daemon = Daemon(
            Profile.enrolled(credentials.bundle, credentials.identity, policy=PERMISSIVE),
            store,
            network,  # type: ignore[arg-type]
            network,  # type: ignore[arg-type]
            data,
            FieldReader(state, state),
            network.inbox,
            client_version="1",
            runtime="none",
        )
        daemon._take(Started())
        daemon._take(LinkUp(bytes(32), "5"))
        network.waiting.append(network.announcement(version))
        while True:
            if network.waiting:
                topic = "covey/v1/dev/barn-1/down/msg"
                daemon._take(Inbound(topic, network.waiting.pop(0), lambda: None))
            elif (item := network.inbox.get(0)) is not None:
                daemon._take(item)  # type: ignore[arg-type]
            else:
                break


class Counted:
    """A database connection that is killed before its n-th statement."""

    def __init__(self, connection: sqlite3.Connection, step: Callable[[], None]) -> None:
        self._connection, self._step = connection, step

    def execute(self, *arguments: Any) -> Any:
        self._step()
        return self._connection.execute(*arguments)

    def close(self) -> None:
        self._connection.close()


def killed(state: Path, fleet: Fleet, before: int, bad: frozenset[int]) -> int:
    """Takes version 2 in a child, which dies before a step; returns the number of steps, when it did not."""
    reading, writing = os.pipe()
    report = os.write
    child = os.fork()
    if child == 0:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == before:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                step()
                return function(*arguments, **options)

            return wrapper

        os.fsync = lambda _: None  # a kill loses nothing that was written, flushed or not
        try:
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            take(state, Aggregator(fleet, bad), 2, lambda connection: Counted(connection, step))
            report(writing, str(count).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (before > 0)
    return int(said or 0)


def answering(state: Path) -> int:
    """The version that a prediction would come from right now, with all its files whole."""
    with DeviceStore.open(state, read_only=True) as store:
        good = [v.manifest for v in store.versions() if v.status is VersionStatus.GOOD]
        for each in good:
            assert store.blobs.read(each.graph) == GRAPHS[each.version] and store.blobs.read(each.weights)
        return good[-1].version


@pytest.mark.parametrize("bad", [frozenset(), frozenset({2})], ids=["runs", "does not run"])
def test_a_kill_before_any_change_leaves_a_device_that_answers_and_gets_there(
    tmp_path: Path, bad: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "MAP_EVERY", 2)
    fleet = Fleet(tmp_path)
    first = fleet.enrolled("barn-1", PERMISSIVE)
    take(first, Aggregator(fleet), 1)
    assert answering(first) == 1

    def device(name: str) -> Path:
        return Path(shutil.copytree(first, tmp_path / name))

    steps = killed(device("whole"), fleet, 0, bad)
    assert steps > 40
    outcomes, came = set(), []
    # Up to the self-test, a version that does not run is one like any other.
    for before in range(steps - 10 if bad else 1, steps + 1):
        state = device(str(before))
        killed(state, fleet, before, bad)
        outcomes.add(answering(state))
        network = Aggregator(fleet, bad)
        take(state, network, 2)
        assert answering(state) == (1 if bad else 2)
        assert network.statuses[-1].models == {"watch": 1 if bad else 2}
        assert bool(network.statuses[-1].failures) == bool(bad)
        came.append(network.chunks)
        shutil.rmtree(state)
    # Serving the new version is the last change of all, so nothing before it shows.
    assert outcomes == {1}
    # Downloads resume: nothing is left to fetch at last.
    assert came[-1] == 0 and (bad or any(0 < chunks < 5 for chunks in came))
