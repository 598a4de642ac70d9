"""Local parameters on the device: they move with its contributions, survive, and are never sent."""

from __future__ import annotations

import hashlib
import queue
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.device_schema import SCHEMA_VERSION
from edge_client.adapters.files import StorageError
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DATABASE, DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.durable import SaveLocal
from edge_client.events import Event, InputWritten, TrainingFinished
from edge_client.masked_input import contribution_of, packed_slices
from edge_client.outputs import MaskInput, Train
from edge_client.training import Examples, LocalTrainer, LocalUpdate, TrainingConfig
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.transfer import describe
from tests.edge_fleet import Aggregator, FakeDevice, manifest, plan, weights

OWN = manifest(local=(4, 2))


def fleet(model: ModelManifest = OWN) -> list[FakeDevice]:
    devices = [FakeDevice(f"device-{i}") for i in range(3)]
    for number, device in enumerate(devices):
        device.local = np.full(6, number + 1, np.float32)
        device.install(model)
        device.take()
    return devices


def trained_with(device: FakeDevice) -> BlobRef | None:
    """The local parameters that the waiting job is to train."""
    (job,) = device.jobs
    assert isinstance(job, Train)
    return job.local


def to_training(devices: list[FakeDevice], round_id: str, model: ModelManifest) -> Aggregator:
    """A round up to where every device has its training before it."""
    aggregator = Aggregator(devices, plan(round_id, model))
    aggregator.step()
    aggregator.ask()
    return aggregator


def test_they_move_once_with_every_contribution() -> None:
    devices = fleet()
    Aggregator(devices, plan(base=OWN)).run()
    for device in devices:
        assert device.local is not None
        wanted = SaveLocal("watch", OWN.local_layout, describe(device.local.tobytes()))
        assert device.disk.local == {"watch": wanted} and len(device.disk.ledger) == 1
        device.reboot()
        device.take()
        assert device.state.library.local(OWN) == wanted.blob


def test_the_next_round_and_the_next_version_train_them_further() -> None:
    devices = fleet()
    first = Aggregator(devices, plan(base=OWN))
    first.run()
    first.end()
    later = manifest(2, local=(4, 2))
    for device in devices:
        device.install(later)
        device.take()
    to_training(devices, "b" * 32, later)
    for device in devices:
        assert trained_with(device) == device.disk.local["watch"].blob


def test_other_shapes_start_anew_and_leave_the_old_ones_until_they_contribute() -> None:
    devices = fleet()
    first = Aggregator(devices, plan(base=OWN))
    first.run()
    first.end()
    later = manifest(2, local=(3, 3))
    for device in devices:
        device.install(later)
        device.take()
    aggregator = to_training(devices, "b" * 32, later)
    for device in devices:
        assert trained_with(device) is None
        assert device.disk.local["watch"].layout == OWN.local_layout
    for _ in range(4):
        aggregator.step()
    for device in devices:
        assert device.disk.local["watch"].layout == later.local_layout


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_kill_before_the_masked_input_changes_nothing(jobs: int) -> None:
    """Before training or after it: what was trained is forgotten with the update, and trained again."""
    devices = fleet()
    to_training(devices, "a" * 32, OWN)
    device = devices[0]
    device.work(jobs)
    device.reboot()
    assert device.disk.local == {} and device.disk.ledger == []
    assert trained_with(device) is None


def test_a_round_that_is_left_before_the_masked_input_changes_nothing() -> None:
    devices = fleet()
    to_training(devices, "a" * 32, OWN)
    device = devices[0]
    device.work(1)
    device.tick(7200)
    assert device.state.active is None
    device.work()
    assert device.disk.local == {}


def test_nothing_of_them_is_in_the_masked_input() -> None:
    devices = fleet()
    aggregator = to_training(devices, "a" * 32, OWN)
    delta = devices[0].delta

    def packed(local: NDArray[np.float32] | None) -> bytes:
        update = LocalUpdate(delta, 7, 1.0, 0.5, 0.9, local)
        return b"".join(packed_slices(contribution_of(update), aggregator.encoding, (), bytes(32)))

    assert packed(None) == packed(np.ones(6, np.float32)) == packed(np.full(6, 1e6, np.float32))


# --- disk ------------------------------------------------------------------------------------------------


def test_the_database_names_them_and_others_are_deleted(tmp_path: Path) -> None:
    with DeviceStore.open(tmp_path) as store:
        first, second = store.blobs.write_local(b"1234"), store.blobs.write_local(b"5678")
        store.apply([SaveLocal("watch", "x" * 64, first)])
        assert store.blobs.read_local(first) == b"1234"
        with pytest.raises(StorageError):
            store.blobs.read_local(second)
        third = store.blobs.write_local(b"9999")
    # A kill after the file and before the transaction: the old ones count.
    with DeviceStore.open(tmp_path) as store:
        assert store.load().local == (SaveLocal("watch", "x" * 64, first),)
        store.keep_local()
        assert store.blobs.read_local(first) == b"1234"
        with pytest.raises(StorageError):
            store.blobs.read_local(third)


def test_a_database_of_before_is_brought_up_to_date(tmp_path: Path) -> None:
    DeviceStore.open(tmp_path).close()
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.executescript(
        "DROP TABLE local; DROP TABLE standings; DROP TABLE pending; PRAGMA user_version = 1;"
    )
    connection.close()
    with DeviceStore.open(tmp_path, read_only=True) as store:
        assert store.local() == ()
    for _ in range(2):
        with DeviceStore.open(tmp_path) as store:
            saved = SaveLocal("watch", "x" * 64, store.blobs.write_local(b"1234"))
            store.apply([saved])
            assert store.local() == (saved,)
    connection = sqlite3.connect(tmp_path / DATABASE)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    connection.close()


# --- worker ----------------------------------------------------------------------------------------------


class Halving:
    """A trainer that halves the local parameters that it is given, or starts with ones."""

    parameter_count = OWN.parameter_count

    def train(
        self,
        weights: NDArray[np.float32],
        examples: Examples,
        config: TrainingConfig,
        generator: np.random.Generator,
        local: NDArray[np.float32] | None = None,
    ) -> LocalUpdate:
        own = np.ones(6, np.float32) if local is None else local / 2
        return LocalUpdate(np.zeros_like(weights), len(examples), 1.0, 0.5, 1.0, own)


def test_the_worker_reads_and_writes_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Examples("device", np.zeros((3, 3), np.float32), np.zeros(3, np.int32)).save(data / "some.npz")
    results: queue.SimpleQueue[Event] = queue.SimpleQueue()
    encoding = Aggregator(fleet(), plan(base=OWN)).encoding

    def trainer(_: ModelManifest, __: bytes) -> LocalTrainer:
        return Halving()  # type: ignore[return-value]

    with DeviceStore.open(tmp_path / "state") as store:
        for content in (weights(), b"graph" * 30_000):
            name = hashlib.sha256(content).hexdigest()
            (tmp_path / "state" / "blobs" / name).write_bytes(content)
        worker = Worker(
            store.blobs, NpzDirectory(data), FieldReader(data, data), results.put, trainer=trainer
        )
        worker.start()
        local: BlobRef | None = None
        try:
            for number in range(3):
                worker.submit(Train("a" * 32, OWN, TrainingConfig(1, 0.1), local))
                finished = results.get(timeout=120)
                assert isinstance(finished, TrainingFinished)
                worker.submit(MaskInput("a" * 32, contribution_of(finished.update), encoding, (), bytes(32)))
                written = results.get(timeout=120)
                assert isinstance(written, InputWritten)
                local = written.local
                assert local is not None
                assert store.blobs.read_local(local) == np.full(6, 0.5**number, "<f4").tobytes()
            # A file that rotted does not keep the device out: they start anew.
            (tmp_path / "state" / "local" / local.sha256).write_bytes(b"rot")
            worker.submit(Train("a" * 32, OWN, TrainingConfig(1, 0.1), local))
            finished = results.get(timeout=120)
            assert isinstance(finished, TrainingFinished)
            assert finished.update.local is not None and finished.update.local.tolist() == [1.0] * 6
        finally:
            worker.stop(60.0)
