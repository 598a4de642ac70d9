"""The device's disk: what was committed survives SIGKILL, and a full disk changes nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.adapters.blobs import MAP_EVERY
from edge_client.adapters.device_schema import UnknownSchema
from edge_client.adapters.files import Lock, StorageError, StorageFull, write_durably
from edge_client.adapters.store import DATABASE, DeviceStore
from edge_client.durable import (
    CloseRound,
    ForgetVersion,
    RoundRecord,
    SaveContribution,
    SaveRound,
    SaveVersion,
    StoreChunk,
    VersionStatus,
)
from models.assignment import Answering
from protocol.messages import CHUNK_BYTES
from protocol.plan import MeanQuestion, QueryTask
from protocol.secagg.client_state import InputSent, dump_state
from protocol.transfer import describe
from tests.edge_fleet import NOW, Aggregator, FakeDevice, announcement, invitation, manifest, plan, weights

ROUND = "a" * 32


def committed_round() -> tuple[RoundRecord, SaveContribution, bytes]:
    """A round of a device that made its masked input, with all its parts."""
    devices = [FakeDevice(f"device-{i}") for i in range(3)]
    for device in devices:
        device.install()
        device.take()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.step()
    aggregator.ask()
    devices[0].work()
    record, _ = devices[0].disk.rounds[ROUND]
    assert isinstance(record.client, InputSent)
    return record, devices[0].disk.ledger[0], devices[0].disk.uploads[ROUND]


def save_version(version: int, status: VersionStatus, reason: str = "") -> SaveVersion:
    model = manifest(version)
    return SaveVersion(announcement(model).manifest, model, status, reason)


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    record, contribution, upload = committed_round()
    with DeviceStore.open(tmp_path) as store:
        store.blobs.write_upload(ROUND, [upload])
        store.apply([SaveRound(record, NOW), contribution, save_version(1, VersionStatus.BAD, "why")])
    with DeviceStore.open(tmp_path) as store:
        memory = store.load()
        assert memory.active == record and memory.used == {ROUND}
        assert memory.joined_at == memory.contributed_at == (NOW,) and store.ledger() == (contribution.entry,)
        assert [(v.status, v.reason) for v in memory.versions] == [(VersionStatus.BAD, "why")]
        with store.blobs.upload(ROUND) as view:
            assert bytes(view) == upload and describe(bytes(view)) == record.upload


def test_a_round_that_asks_a_query_comes_back_without_a_manifest(tmp_path: Path) -> None:
    record, _, _ = committed_round()
    task = QueryTask(field="battery", low=0.0, high=80.0, question=MeanQuestion())
    privacy = plan().privacy.model_copy(update={"clip_norm": 1.0, "metric_slots": (), "rotation": False})
    asked = invitation(plan(task=task, privacy=privacy)).plan
    record = replace(record, document=asked, assignment=Answering(task))
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveRound(record, NOW)])
    with DeviceStore.open(tmp_path) as store:
        assert store.load().active == record


def test_a_closed_round_leaves_no_secret_behind(tmp_path: Path) -> None:
    record, contribution, upload = committed_round()
    assert isinstance(record.client, InputSent)
    with DeviceStore.open(tmp_path) as store:
        store.blobs.write_upload(ROUND, [upload])
        store.apply([SaveRound(record, NOW), contribution])
        phase, state = dump_state(record.client)
        assert phase == "InputSent" and state in _bytes_of(tmp_path)
        store.apply([CloseRound(ROUND, "completed", NOW)])
        memory = store.load()
        assert memory.active is None and memory.used == {ROUND} and len(memory.contributed_at) == 1
        assert not (tmp_path / "uploads" / ROUND).exists()
        # secure_delete and the emptied log: not in any file of the directory any more.
        secret = state[state.index(b'"opening_keys"') :][:60]
        assert secret not in _bytes_of(tmp_path)


def _bytes_of(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob(f"{DATABASE}*")))


def test_only_one_round_is_ever_active(tmp_path: Path) -> None:
    record, _, _ = committed_round()
    other = replace(
        record, client=replace(record.client, context=replace(record.client.context, round_id="b" * 32))
    )
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveRound(record, NOW)])
        with pytest.raises(StorageError):
            store.apply([SaveRound(other, NOW)])
        assert store.load().used == {ROUND}
        store.apply([CloseRound(ROUND, "superseded", NOW), SaveRound(other, NOW)])
        assert store.load().used == {ROUND, "b" * 32}


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    record, contribution, _ = committed_round()
    with DeviceStore.open(tmp_path) as store:
        with pytest.raises(StorageError):
            store.apply([SaveRound(record, NOW), contribution, contribution])
        memory = store.load()
        assert memory.active is None and not memory.used and not store.ledger()


def test_everything_is_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with DeviceStore.open(state) as store:
        store.apply([save_version(1, VersionStatus.CANDIDATE)])
        store.apply([StoreChunk(manifest().weights, 0, weights())])
        store.blobs.find(manifest().weights)
        store.blobs.write_upload(ROUND, [b"masked"])
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [state, *state.rglob("*")]}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize("pragma", ["user_version = 5", "application_id = 7"])
def test_an_unknown_schema_is_refused_and_left_alone(tmp_path: Path, pragma: str) -> None:
    DeviceStore.open(tmp_path).close()
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.execute(f"PRAGMA {pragma}")
    connection.close()
    before = (tmp_path / DATABASE).read_bytes()
    for read_only in (False, True):
        with pytest.raises(UnknownSchema, match="another state directory"):
            DeviceStore.open(tmp_path, read_only=read_only)
    assert (tmp_path / DATABASE).read_bytes() == before


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database, " * 100)
    with pytest.raises(StorageError):
        DeviceStore.open(tmp_path)


# --- blobs -----------------------------------------------------------------------------------------------


def test_a_download_goes_on_where_its_map_says(tmp_path: Path) -> None:
    data = os.urandom(CHUNK_BYTES * (MAP_EVERY + 5) - 100)
    blob = describe(data)
    parts = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    order = [*range(1, len(parts)), 0]
    with DeviceStore.open(tmp_path) as store:
        for index in order[: MAP_EVERY + 2]:
            store.apply([StoreChunk(blob, index, memoryview(parts[index]))])
        assert len(store.blobs.find(blob).chunks) == MAP_EVERY + 2
    with DeviceStore.open(tmp_path) as store:
        found = store.blobs.find(blob)
        assert not found.complete and found.chunks == tuple(sorted(order[:MAP_EVERY]))
        for index in order[MAP_EVERY:]:
            store.apply([StoreChunk(blob, index, parts[index])])
        assert store.blobs.find(blob).complete and store.blobs.read(blob) == data
    with DeviceStore.open(tmp_path) as store:
        assert store.blobs.find(blob).complete
        assert list((tmp_path / "partial").iterdir()) == []


def test_a_download_with_a_wrong_digest_is_thrown_away(tmp_path: Path) -> None:
    blob = describe(b"right content")
    with DeviceStore.open(tmp_path) as store:
        store.apply([StoreChunk(blob, 0, b"wrong content")])
        found = store.blobs.find(blob)
        assert not found.complete and found.chunks == () and not store.blobs.has(blob)
        store.apply([StoreChunk(blob, 0, b"right content")])
        assert store.blobs.find(blob).complete


def test_a_file_that_rotted_is_noticed_and_fetched_anew(tmp_path: Path) -> None:
    blob = manifest().weights
    with DeviceStore.open(tmp_path) as store:
        for data in (manifest().graph, blob):
            assert not store.blobs.has(data)
        store.apply([StoreChunk(blob, 0, weights()), save_version(1, VersionStatus.GOOD)])
        assert store.blobs.find(blob).complete
        (tmp_path / "blobs" / blob.sha256).write_bytes(bytes(blob.size))
        with pytest.raises(StorageError, match="damaged"):
            store.blobs.read(blob)
        assert not store.blobs.find(blob).complete
        assert [version.status for version in store.load().versions] == [VersionStatus.CANDIDATE]


def test_only_what_is_needed_is_kept(tmp_path: Path) -> None:
    blobs = [describe(bytes([i]) * 10) for i in range(3)]
    with DeviceStore.open(tmp_path) as store:
        for i, blob in enumerate(blobs):
            store.apply([StoreChunk(blob, 0, bytes([i]) * 10)])
        store.blobs.find(blobs[0])
        store.blobs.find(blobs[1])
        store.blobs.write_upload("b" * 32, [b"x"])
        store.blobs.keep(frozenset({blobs[1].sha256}))
        store.blobs.keep_upload(None)
        assert [path.name for path in tmp_path.glob("*/*")] == [blobs[1].sha256]
        store.apply([save_version(2, VersionStatus.GOOD), ForgetVersion(manifest(2).sha256())])
        assert store.versions() == ()


def test_the_lock_is_for_one_process_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import time; from pathlib import Path; from edge_client.adapters.files import Lock;"
        f"lock = Lock(Path({str(path)!r})); print(lock.acquire(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    lock = Lock(path)
    assert not lock.acquire()
    holder.kill()
    holder.communicate()
    assert lock.acquire()
    lock.release()


# --- SIGKILL and a full disk -----------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from edge_client.adapters.store import DeviceStore
from edge_client.durable import SaveContribution
from tests.edge_fleet import NOW
from tests.unit.test_edge_store import committed_round
_, contribution, upload = committed_round()
store = DeviceStore.open(Path({state!r}))
print("ready", flush=True)
for number in range(int(sys.argv[1]), 10**6):
    round_id = f"{{number:032x}}"
    store.blobs.write_upload(round_id, [upload])
    store.apply([SaveContribution(contribution.entry.model_copy(update={{"round_id": round_id}}))])
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = _WRITER.format(root=str(root), state=str(tmp_path / "state"))
    acknowledged, begin = 0, 0
    for attempt in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(begin)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        for _ in range(3 + 7 * attempt):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        with DeviceStore.open(tmp_path / "state") as store:
            numbers = [int(entry.round_id, 16) for entry in store.ledger()]
            assert numbers == list(range(len(numbers))), "a gap, or an order that was not written"
            for number in numbers[-3:]:
                with store.blobs.upload(f"{number:032x}") as view:
                    assert len(view) > 0
        said = [int(line) for line in rest.split()]
        acknowledged = max([acknowledged, *said])
        assert numbers[-1] >= acknowledged, "something acknowledged is lost"
        begin = numbers[-1] + 1


def test_a_full_disk_is_a_typed_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_durably(target, [b"old"])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull, match="No space"):
            write_durably(target, [b"new"])
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_database_is_a_typed_error_and_goes_on_later(tmp_path: Path) -> None:
    record, contribution, _ = committed_round()
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveRound(record, NOW)])
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageFull):
            store.apply([save_version(version, VersionStatus.GOOD) for version in range(1, 40)])
        assert store.load().active == record and store.versions() == ()
        store._connection.execute("PRAGMA max_page_count = 100000")
        store.apply([contribution])
        assert len(store.ledger()) == 1
