"""The loop: durable before sent, nothing sent when the disk refuses, and a device that goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from edge_client import daemon as daemons
from edge_client import inbox as inboxes
from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.files import StorageFull
from edge_client.adapters.mqtt import Inbound, LinkUp
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.daemon import Daemon
from edge_client.durable import Durable
from edge_client.events import Fault, VersionTested, WorkFailed
from edge_client.inbox import Inbox, Stop
from edge_client.outputs import Train, note
from edge_client.profile import Profile
from edge_client.training import TrainingConfig
from models import zoo
from models.weights import encode_weights
from protocol.codec import MAX_FRAME_BYTES, decode_from_device, encode
from protocol.identity import SignedDocument
from protocol.messages import (
    AdvertiseKeys,
    BlobNeed,
    ClientAbort,
    DeviceStatus,
    FromDevice,
    Invitation,
    ModelAnnouncement,
    ToDevice,
)
from protocol.plan import MODEL_KIND, PLAN_KIND
from protocol.transfer import chunks
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment
from tests.edge_broker import FLEET, Fleet
from tests.edge_fleet import PERMISSIVE, plan

WATCH = zoo.load("watch")
TOPIC = "covey/v1/dev/barn-1/down/msg"


class FakeLink:
    """Remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[FromDevice] = []
        self.goodbye: DeviceStatus | None = None

    def start(self) -> None:
        """Connects to nothing."""

    def send(self, channel: str, frame: bytes, *, retain: bool = False) -> bool:
        """Takes a frame."""
        self.sent.append(decode_from_device(frame)[0])
        return True

    def stop(self, status: DeviceStatus | None = None) -> None:
        """Takes the last status."""
        self.goodbye = status


class Bench:
    """A daemon whose loop the test turns by hand."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fleet = Fleet(directory)
        state = self.fleet.enrolled("barn-1", PERMISSIVE)
        credentials = load_credentials(state)
        self.store = DeviceStore.open(state)
        self.link, self.inbox = FakeLink(), Inbox()
        self.acknowledged = 0
        self.full = False
        real = self.store.apply

        def apply(outputs: Iterable[Durable]) -> None:
            outputs = tuple(outputs)
            if self.full and outputs:
                raise StorageFull(28, "No space left on device")
            real(outputs)

        monkeypatch.setattr(self.store, "apply", apply)
        data = NpzDirectory(self.fleet.data("barn-1", WATCH.manifest))
        fields = FieldReader(directory, directory)
        self.worker = Worker(self.store.blobs, data, fields, self.inbox.put)
        self.daemon = Daemon(
            Profile.enrolled(credentials.bundle, credentials.identity, policy=PERMISSIVE),
            self.store,
            self.link,  # type: ignore[arg-type]
            self.worker,
            data,
            fields,
            self.inbox,
            client_version="1",
            runtime="none",
        )

    def give(self, message: ToDevice | bytes, body: bytes | memoryview = b"", topic: str = TOPIC) -> None:
        frame = message if isinstance(message, bytes) else encode(message, body)

        def acknowledge() -> None:
            self.acknowledged += 1

        self.daemon._take(Inbound(topic, frame, acknowledge))

    def announce(self) -> None:
        document = SignedDocument.create(self.fleet.operator, MODEL_KIND, WATCH.manifest.to_bytes())
        model = WATCH.manifest
        assignment = VersionAssignment(
            fleet=FLEET, model="watch", version=1, manifest_sha256=model.sha256(), sequence=1
        )
        told = SignedDocument.create(self.fleet.operator, ASSIGNMENT_KIND, assignment.to_bytes())
        self.give(ModelAnnouncement(assignment=told, manifest=document), topic="covey/v1/bcast/model/watch")

    def serve(self) -> None:
        """Sends the chunks that were asked for, until nothing is asked for any more."""
        blobs = {
            WATCH.manifest.graph.sha256: WATCH.graph,
            WATCH.manifest.weights.sha256: encode_weights(WATCH.weights.copy()),
        }
        while needs := [message for message in self.take() if isinstance(message, BlobNeed)]:
            for need in needs:
                for chunk, body in chunks(need.blob, blobs[need.blob.sha256], need.indices):
                    self.give(chunk, body)

    def invite(self) -> None:
        now = int(time.time())
        signed = plan(base=WATCH.manifest, issued_at=now, expires_at=now + 600)
        self.give(Invitation(plan=SignedDocument.create(self.fleet.operator, PLAN_KIND, signed.to_bytes())))

    def take(self) -> list[FromDevice]:
        sent, self.link.sent = self.link.sent, []
        return sent


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Bench(tmp_path, monkeypatch)
    yield made
    made.store.close()


def test_nothing_is_said_that_the_disk_does_not_know(bench: Bench) -> None:
    bench.full = True
    bench.announce()
    assert bench.take() == [] and bench.acknowledged == 1 and bench.daemon.counts["storage-error"] == 1
    bench.full = False
    bench.announce()
    bench.full = True
    bench.serve()  # the first chunk is refused: it is asked for again later
    assert bench.store.load().versions[0].manifest == WATCH.manifest
    bench.full = False
    bench.daemon._take(LinkUp(bytes(32), "5"))
    bench.serve()
    bench.worker.start()
    bench.full = True
    item = bench.inbox.get(60.0)
    assert item is not None and not isinstance(item, Stop)
    bench.daemon._take(item)  # tested, and the disk is full: the result waits
    assert bench.daemon._state.library.serving() == {}
    bench.full = False
    bench.daemon._tick(time.monotonic() + daemons.STORAGE_PAUSE_SECONDS + 1)
    assert bench.daemon._state.library.serving() == {"watch": 1}
    assert [message for message in bench.take() if isinstance(message, DeviceStatus)]

    bench.full = True
    bench.invite()
    assert bench.take() == [] and bench.daemon._state.active is None
    bench.full = False
    bench.invite()
    assert [type(message) for message in bench.take()] == [AdvertiseKeys]
    bench.full = True
    bench.daemon._take(WorkFailed("a" * 32, Fault("disk-full", "no space", transient=True)))
    assert bench.take() == [] and bench.daemon._state.active is not None
    bench.full = False
    bench.daemon._tick(time.monotonic() + daemons.STORAGE_PAUSE_SECONDS + 1)
    assert [type(message) for message in bench.take()] == [ClientAbort]
    bench.worker.stop(60.0)


def test_garbage_is_counted_and_acknowledged(bench: Bench) -> None:
    bench.give(b"garbage")
    bench.invite()
    frame = encode(Invitation(plan=SignedDocument.create(bench.fleet.operator, PLAN_KIND, b"{}")))
    bench.give(frame, topic="covey/v1/bcast/model/watch")
    assert bench.daemon.counts["malformed"] == 2 and bench.acknowledged == 3


def test_a_defect_in_the_core_does_not_stop_the_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(daemons, "handle", lambda *_: 1 / 0)
        bench.announce()
    assert bench.daemon.counts["rejected"] == 1 and "ZeroDivisionError" in caplog.text
    bench.announce()
    assert [type(message) for message in bench.take()] == [BlobNeed]


def test_the_inbox_is_bounded_for_the_network_only() -> None:
    inbox = Inbox()
    inbound = Inbound(TOPIC, b"", lambda: None)
    assert all(inbox.from_link(inbound) for _ in range(inboxes.QUEUE_LENGTH))
    assert not inbox.from_link(inbound)
    assert inbox.from_link(LinkUp(bytes(32), "5"))
    inbox.put(Stop())


def test_the_inbox_is_bounded_in_bytes() -> None:
    """A thousand large frames, of a broker that heeds no receive maximum, are more than a device has."""
    inbox = Inbox()
    inbound = Inbound(TOPIC, bytes(MAX_FRAME_BYTES), lambda: None)
    taken = sum(inbox.from_link(inbound) for _ in range(inboxes.QUEUE_LENGTH))
    assert 0 < taken * MAX_FRAME_BYTES <= inboxes.QUEUE_BYTES
    assert inbox.get(0) is inbound and inbox.from_link(inbound) and not inbox.from_link(inbound)


def test_training_for_rounds_that_are_over_is_not_made_up_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = threading.Event(), threading.Event()
    done: list[str] = []

    def train(job: Train) -> VersionTested:
        started.set()
        release.wait(120)
        done.append(job.round_id)
        return VersionTested("", None)

    monkeypatch.setattr(bench.worker, "_do", train)
    config = TrainingConfig(local_epochs=1, learning_rate=0.1, proximal_mu=0.0, seed=1)
    bench.worker.start()
    bench.worker.submit(Train("a" * 32, WATCH.manifest, config))
    assert started.wait(120)
    for name in "bcd":
        bench.worker.submit(Train(name * 32, WATCH.manifest, config))
    release.set()
    bench.worker.stop(60.0)
    assert done == ["a" * 32, "d" * 32]


def test_a_note_is_one_line_whatever_the_aggregator_says(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        daemons.log(note("round-closed", outcome="ended:\nplan-accepted\tround=1"))
    assert len(caplog.messages[0].splitlines()) == 1


def test_the_loop_ends_with_an_offline_status(bench: Bench) -> None:
    bench.inbox.put(Stop())
    bench.daemon.run()
    assert bench.link.goodbye is not None and not bench.link.goodbye.online


def test_a_round_that_cannot_be_read_is_left_and_its_id_stays_used(bench: Bench) -> None:
    bench.announce()
    bench.serve()
    bench.invite()
    assert [type(message) for message in bench.take()] == [AdvertiseKeys]
    bench.store._connection.execute("UPDATE rounds SET client = x'7b7d'")
    bench.store._connection.execute("UPDATE versions SET manifest = x'00'")
    memory = bench.store.load()
    assert memory.active is None and memory.used == {"a" * 32} and memory.versions == ()
    assert bench.store.rounds()[0].outcome == "unreadable"
