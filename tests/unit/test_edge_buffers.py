"""Updates that wait for a buffer: trained by a standing order, weighed by their age, contributed once."""

from __future__ import annotations

import hashlib
import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.files import StorageError
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.worker import Worker
from edge_client.durable import DropPending, SavePending, SaveRound
from edge_client.events import (
    ConditionsChanged,
    Connected,
    Event,
    Fault,
    PreparationFailed,
    UpdatePrepared,
    UpdateRead,
    WorkFailed,
)
from edge_client.masked_input import Contribution
from edge_client.outputs import MaskInput, PrepareUpdate, ReadUpdate
from edge_client.pending_file import InvalidUpdate, dump_update, load_update
from edge_client.report import status, status_text
from edge_client.training import Examples, LocalTrainer, LocalUpdate, TrainingConfig
from models.manifest import EXAMPLE_SIGNATURES, ModelManifest, SignatureSpec
from protocol.dp.parameters import ExamplePrivacy, PrivacyMode, PrivacyParameters
from protocol.identity import SignedDocument
from protocol.messages import (
    AdvertiseKeys,
    BlobNeed,
    FromDevice,
    Refusal,
    RoundEnd,
    TrainingOrder,
    UpdateReady,
)
from protocol.plan import PLAN_KIND
from protocol.transfer import describe
from tests.edge_broker import Fleet
from tests.edge_fleet import (
    GRAPH,
    NOW,
    OPERATOR,
    ORDER,
    PERMISSIVE,
    SIZE,
    STRANGER,
    Aggregator,
    FakeDevice,
    announcement,
    buffer_plan,
    invitation,
    manifest,
    order,
    plan,
    serve,
    weights,
)
from tests.unit.test_edge_fields import query_plan


def device_at(version: int = 1, name: str = "device-0") -> FakeDevice:
    device = FakeDevice(name)
    device.install(manifest(version))
    device.take()
    return device


def ready(name: str = "device-0", version: int = 1, **changes: object) -> FakeDevice:
    """A device whose update, trained from a version, waits."""
    device = device_at(version, name)
    device.receive(order(manifest(version), **changes))  # type: ignore[arg-type]
    device.work()
    assert device.take() == [UpdateReady(order=str(changes.get("order_id", ORDER)), version=version)]
    return device


def refusal(device: FakeDevice) -> Refusal:
    (message,) = device.take()
    assert isinstance(message, Refusal)
    return message


def said(device: FakeDevice) -> list[FromDevice]:
    return [message for message in device.take() if not isinstance(message, BlobNeed)]


# --- from the order to the file --------------------------------------------------------------------------


def test_an_order_is_trained_at_once_and_the_update_survives_a_reboot() -> None:
    device = ready()
    update = device.disk.pending["watch"]
    kept = load_update(device.disk.files[update.blob.sha256])
    norm = float(np.linalg.norm(kept.vector))
    assert norm <= 10.0 * (1 + 1e-6), "it is clipped on disk"
    assert kept.metrics["examples"] == 7
    device.reboot()
    assert said(device) == [UpdateReady(order=ORDER, version=1)]
    device.receive(order())  # repeated: nothing is trained again
    assert not device.jobs and said(device) == [UpdateReady(order=ORDER, version=1)]


def test_a_kill_in_training_loses_the_order_which_comes_again() -> None:
    device = device_at()
    device.receive(order())
    assert [type(job) for job in device.jobs] == [PrepareUpdate]
    device.reboot()
    assert not device.jobs and said(device) == [] and not device.disk.pending
    device.receive(order())
    device.work()
    assert said(device) == [UpdateReady(order=ORDER, version=1)]


def test_the_version_of_an_order_is_fetched_first() -> None:
    device = device_at(1)
    second = manifest(2)
    device.receive(order(second))
    assert not device.jobs
    serve(device, {second.weights.sha256: weights(2)})
    device.work()  # the version is tested
    device.tick(1.0)
    (job,) = device.jobs
    assert isinstance(job, PrepareUpdate) and job.manifest == second
    device.work()
    assert said(device) == [UpdateReady(order=ORDER, version=2)]
    assert device.state.library.serving() == {"watch": 1}, "a version to train from is not served"


def test_nothing_is_trained_while_a_round_runs_or_the_device_is_unfit() -> None:
    device = device_at()
    device.receive(invitation(plan()))
    device.receive(order())
    device.tick(1.0)
    assert not device.jobs
    device.receive(RoundEnd(round_id="a" * 32, completed=False))
    device.state = replace(device.state, unfit=Fault("too-hot", "81 degrees"))
    device.tick(1.0)
    assert not device.jobs
    device.state = replace(device.state, unfit=None)
    device.tick(1.0)
    assert [type(job) for job in device.jobs] == [PrepareUpdate]


def test_an_unfit_device_says_nothing_of_its_update_until_it_is_fit() -> None:
    device = ready()
    hot = Fault("conditions", "its processor has 81 C", transient=True)
    device.give(ConditionsChanged(hot))
    device.receive(order())
    device.give(Connected())
    assert said(device) == [] and device.disk.pending
    device.receive(invitation(buffer_plan("b" * 32, manifest())))
    assert refusal(device).code == "conditions"
    device.give(ConditionsChanged(None))
    assert said(device) == [UpdateReady(order=ORDER, version=1)]
    # Of one that becomes unfit while it trains, too.
    late = device_at()
    late.receive(order())
    late.give(ConditionsChanged(hot))
    late.work()
    assert said(late) == [] and late.disk.pending
    late.give(ConditionsChanged(None))
    assert said(late) == [UpdateReady(order=ORDER, version=1)]


def test_an_order_that_its_buffers_would_be_refused_for_is_refused() -> None:
    device = FakeDevice(
        policy=PERMISSIVE.model_copy(update={"privacy_modes": frozenset({PrivacyMode.LOCAL})})
    )
    device.install()
    device.take()
    device.receive(order())
    found = refusal(device)
    assert (found.code, found.round_id) == ("privacy-mode", ORDER) and not device.jobs


def test_an_order_of_a_stranger_or_signed_as_a_plan_is_refused() -> None:
    device = device_at()
    device.receive(order(signer=STRANGER))
    assert refusal(device).code == "bad-signature"
    genuine = order()
    as_plan = SignedDocument.create(OPERATOR, PLAN_KIND, genuine.plan.payload)
    device.receive(TrainingOrder(plan=as_plan, manifest=genuine.manifest))
    assert refusal(device).code == "bad-signature"
    # And no round can be made of an order.
    device.receive(invitation(plan()).model_copy(update={"plan": genuine.plan}))
    assert refusal(device).code == "bad-signature"
    # One that names another order than itself is none.
    mixed = buffer_plan("b" * 32, manifest())
    document = SignedDocument.create(OPERATOR, "training-order", mixed.to_bytes())
    device.receive(TrainingOrder(plan=document, manifest=genuine.manifest))
    assert refusal(device).code == "bad-plan" and not device.jobs


def test_an_old_order_that_is_replayed_does_nothing() -> None:
    device = ready()
    device.receive(order(order_id="7" * 32, issued_at=NOW - 500))
    assert said(device) == [] and device.disk.pending["watch"].order == ORDER


def test_a_failed_training_is_told_and_may_be_ordered_again() -> None:
    device = device_at()
    device.receive(order())
    device.jobs.clear()
    device.give(PreparationFailed("watch", ORDER, Fault("non-finite-update", "no finite update")))
    assert refusal(device).code == "non-finite-update"
    device.receive(order())
    assert [type(job) for job in device.jobs] == [PrepareUpdate]


def test_a_version_that_fails_in_training_is_distrusted() -> None:
    device = device_at(1)
    device.install(manifest(2))
    device.take()
    device.receive(order(manifest(2)))
    device.jobs.clear()
    device.give(PreparationFailed("watch", ORDER, Fault("model-unusable", "an unknown operation")))
    assert refusal(device).code == "model-unusable"
    assert device.state.library.serving() == {"watch": 1}


# --- too old, of another order, expired ------------------------------------------------------------------


def test_an_update_that_is_too_old_is_dropped_and_said_so() -> None:
    device = ready()
    for version in (2, 3):
        device.receive(order(manifest(version)))
        assert said(device) == [UpdateReady(order=ORDER, version=1)], "at most 2 versions older"
    device.receive(order(manifest(4)))
    assert not device.disk.pending
    (told,) = [note for note in device.notes if note.event == "update-dropped"]
    assert "3 versions old, 2 are allowed" in told.fields["reason"]
    serve(device, {manifest(4).weights.sha256: weights(4)})
    device.work()
    device.tick(1.0)
    device.work()
    assert said(device) == [UpdateReady(order=ORDER, version=4)]


def test_a_buffer_gets_no_update_that_is_too_old_or_not_there() -> None:
    device = ready()
    device.receive(invitation(buffer_plan("b" * 32, manifest(4))))
    assert refusal(device).code == "update-too-old"
    device.receive(invitation(buffer_plan("c" * 32, manifest(1), "7" * 32)))
    assert refusal(device).code == "no-update-ready"
    idle = device_at(1, "device-1")
    idle.receive(invitation(buffer_plan("b" * 32, manifest(1))))
    assert refusal(idle).code == "no-update-ready"


def test_a_buffer_must_ask_for_what_the_order_trained() -> None:
    """Else a plan could claim noise that the order did not have, and the ledger would believe it."""
    device = ready()
    task = buffer_plan("b" * 32, manifest()).task
    assert task.kind == "train"
    for changes in (
        {"privacy": plan().privacy.model_copy(update={"clip_norm": 5.0})},
        {"training": task.training.model_copy(update={"local_epochs": 2})},
    ):
        device.receive(invitation(buffer_plan("b" * 32, manifest(), **changes)))
        assert refusal(device).code == "bad-plan"


def test_another_campaign_replaces_what_waits() -> None:
    device = ready()
    device.receive(order(order_id="7" * 32))
    assert not device.disk.pending
    device.work()
    assert said(device) == [UpdateReady(order="7" * 32, version=1)]


def test_an_expired_order_takes_its_update_along() -> None:
    device = ready()
    device.tick(3600)
    assert not device.disk.pending and not device.state.library.pending
    assert "update-dropped" in device.note_events()


# --- in a buffer -----------------------------------------------------------------------------------------


def test_a_buffer_sums_updates_of_several_versions_with_their_weights() -> None:
    devices = [ready(f"device-{i}", version) for i, version in enumerate((3, 3, 2, 1))]
    asked = buffer_plan("b" * 32, manifest(3))
    aggregator = Aggregator(devices, asked)

    def look(device: FakeDevice) -> None:
        assert not any(isinstance(job, PrepareUpdate) for job in device.jobs), (
            "nothing is trained in a buffer"
        )
        if device.device_id in ("device-0", "device-3") and device.phase() == "Masking":
            device.reboot()

    aggregator.run(look)
    expected = np.zeros(SIZE)
    for device, staleness in zip(devices, (0, 0, 1, 2), strict=True):
        norm = np.linalg.norm(device.delta.astype(np.float64))
        clipped = device.delta * min(1.0, asked.privacy.clip_norm / norm)
        expected += clipped / np.sqrt(1 + staleness) / len(devices)
    mean, metrics = aggregator.mean()
    np.testing.assert_allclose(mean, expected, atol=2e-3)
    assert metrics["examples"] == pytest.approx(7, abs=0.01)
    aggregator.end()
    for device in devices:
        assert not device.disk.pending and not device.state.library.pending
        assert [item.entry.round_id for item in device.disk.ledger] == ["b" * 32]


def to_masking(device: FakeDevice) -> Aggregator:
    """A buffer up to where a device has the masking of its update before it."""
    others = [ready(f"device-{i}") for i in (1, 2)]
    aggregator = Aggregator([device, *others], buffer_plan("b" * 32, manifest()))
    aggregator.step()
    aggregator.step()
    aggregator.ask()
    return aggregator


def test_killed_before_its_input_is_committed_a_device_contributes_to_a_later_buffer() -> None:
    device = ready()
    to_masking(device)
    assert [type(job) for job in device.jobs] == [MaskInput] and device.phase() == "Masking"
    device.disk.uploads["b" * 32] = b"written, and never committed"
    device.reboot()
    assert [type(job) for job in device.jobs] == [ReadUpdate]
    device.receive(RoundEnd(round_id="b" * 32, completed=False, reason="too few"))
    assert device.disk.pending and not device.disk.ledger
    device.take()
    later = [device, *(ready(f"device-{i}") for i in (1, 2))]
    aggregator = Aggregator(later, buffer_plan("c" * 32, manifest(2)))
    aggregator.run()
    assert [item.entry.round_id for item in device.disk.ledger] == ["c" * 32]


@pytest.mark.parametrize("rebooted", [False, True])
def test_once_its_input_is_committed_an_update_is_never_in_another_buffer(rebooted: bool) -> None:
    """Whatever becomes of the buffer: an aggregator could have unmasked it and said otherwise."""
    device = ready()
    to_masking(device)
    device.work()
    assert device.phase() == "InputSent" and not device.disk.pending
    if rebooted:
        device.reboot()
    device.take()
    device.receive(RoundEnd(round_id="b" * 32, completed=False, reason="too few"))
    device.receive(invitation(buffer_plan("c" * 32, manifest(2))))
    assert refusal(device).code == "no-update-ready"
    # The commit was lost with the power: then nobody has seen the input either.
    assert len(device.disk.ledger) == 1


def test_a_device_does_not_say_ready_while_a_buffer_has_its_update() -> None:
    device = ready()
    device.receive(invitation(buffer_plan("b" * 32, manifest())))
    assert [type(message) for message in device.take()] == [AdvertiseKeys]
    device.receive(order(manifest(2)))
    assert said(device) == []
    device.reboot()
    assert [type(message) for message in said(device)] == [AdvertiseKeys]
    device.receive(RoundEnd(round_id="b" * 32, completed=False))
    device.receive(order())
    assert said(device) == [UpdateReady(order=ORDER, version=1)]


def test_an_update_that_cannot_be_read_is_dropped_and_trained_anew() -> None:
    device = ready()
    to_masking(device)
    device.reboot()
    assert [type(job) for job in device.jobs] == [ReadUpdate]
    device.give(WorkFailed("b" * 32, Fault("update-lost", "the update that waited is damaged")))
    assert not device.disk.pending and device.state.active is None
    full = ready()
    to_masking(full)
    assert [type(job) for job in full.jobs] == [MaskInput]
    full.give(WorkFailed("b" * 32, Fault("disk-full", "no space is left", transient=True)))
    assert full.disk.pending, "a full disk is no reason to train again"


def test_other_rounds_leave_what_waits_alone() -> None:
    devices = [ready(f"device-{i}") for i in range(3)]
    for device in devices:
        device.declare(battery=3.0)
    Aggregator(devices, query_plan()).run()
    assert all(device.disk.pending for device in devices)


def test_a_version_on_its_way_is_no_hindrance() -> None:
    """A device keeps no files for an update that waits: only its manifest."""
    device = ready()
    device.receive(announcement(manifest(2)))
    serve(device, {manifest(2).weights.sha256: weights(2)})
    device.work()
    device.install(manifest(3))
    assert manifest(1).weights.sha256 not in device.disk.blobs
    device.take()
    others = [ready(f"device-{i}", 3) for i in (1, 2)]
    aggregator = Aggregator([device, *others], buffer_plan("b" * 32, manifest(3)))
    aggregator.run()


# --- the file --------------------------------------------------------------------------------------------


def test_the_file_of_an_update_comes_back_and_refuses_damage() -> None:
    vector, own = np.arange(5, dtype=np.float32), np.ones(2, np.float32)
    for local in (None, own):
        data = dump_update(Contribution(vector, {"examples": 3.0}, local))
        back = load_update(data)
        np.testing.assert_array_equal(back.vector, vector)
        assert back.metrics == {"examples": 3.0}
        assert (back.local is None) == (local is None)
        if back.local is not None:
            np.testing.assert_array_equal(back.local, own)
        for length in (0, 5, data.index(b"\n"), data.index(b"\n") + 7, data.index(b"\n") + 17):
            with pytest.raises(InvalidUpdate):
                load_update(data[:length])


def test_local_parameters_move_with_the_buffer_and_not_before() -> None:
    own = manifest(local=(4, 2))
    devices = [FakeDevice(f"device-{i}") for i in range(3)]
    for number, device in enumerate(devices):
        device.local = np.full(6, number + 1, np.float32)
        device.install(own)
        device.take()
        device.receive(order(own))
        device.work()
        assert device.disk.pending and not device.disk.local
        device.take()
    Aggregator(devices, buffer_plan("b" * 32, own)).run()
    for device in devices:
        assert device.local is not None
        assert device.disk.local["watch"].blob == describe(device.local.tobytes())


# --- disk and worker ---------------------------------------------------------------------------------------


def test_the_database_names_the_update_and_other_files_are_deleted(tmp_path: Path) -> None:
    update = ready().disk.pending["watch"]
    with DeviceStore.open(tmp_path) as store:
        first = replace(update, blob=store.blobs.write_pending(b"first"))
        stray = store.blobs.write_pending(b"of a training that was cut off")
        store.apply([SavePending(first)])
        with pytest.raises(StorageError):
            store.blobs.read_pending(stray)
    with DeviceStore.open(tmp_path) as store:
        assert store.load().pending == (first,)
        second = replace(update, blob=store.blobs.write_pending(b"second"))
        store.apply([SavePending(second)])
        assert store.load().pending == (second,)
        with pytest.raises(StorageError):
            store.blobs.read_pending(first.blob)
        store.apply([DropPending("watch")])
        with pytest.raises(StorageError):
            store.blobs.read_pending(second.blob)
    with DeviceStore.open(tmp_path) as store:
        assert store.load().pending == ()


def test_the_commit_to_an_input_and_the_end_of_its_update_are_one_transaction(tmp_path: Path) -> None:
    device = ready()
    to_masking(device)
    update = device.disk.pending["watch"]
    device.work()
    record, _ = device.disk.rounds["b" * 32]
    commit = [SaveRound(record, NOW), device.disk.ledger[0], DropPending("watch")]
    with DeviceStore.open(tmp_path) as store:
        store.apply([SavePending(replace(update, blob=store.blobs.write_pending(b"update")))])
        store._connection.execute(
            "CREATE TRIGGER full BEFORE DELETE ON pending BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        with pytest.raises(StorageError):
            store.apply(commit)
        memory = store.load()
        assert memory.pending and memory.active is None and not store.ledger()
        store._connection.execute("DROP TRIGGER full")
        store.apply(commit)
        memory = store.load()
        assert not memory.pending and memory.active == record and len(store.ledger()) == 1


class Reaching:
    """A trainer that moves every parameter by 10."""

    parameter_count = SIZE

    def train(self, weights: NDArray[np.float32], examples: Examples, *_: object) -> LocalUpdate:
        return LocalUpdate(np.full_like(weights, 10.0), len(examples), 1.0, 0.5, 1.0)


def test_the_worker_trains_clips_keeps_and_reads(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Examples("device", np.zeros((3, 3), np.float32), np.zeros(3, np.int32)).save(data / "some.npz")
    results: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def trainer(_: ModelManifest, __: bytes) -> LocalTrainer:
        return Reaching()  # type: ignore[return-value]

    with DeviceStore.open(tmp_path / "state") as store:
        for content in (weights(), GRAPH):
            (tmp_path / "state" / "blobs" / hashlib.sha256(content).hexdigest()).write_bytes(content)
        worker = Worker(
            store.blobs, NpzDirectory(data), FieldReader(data, data), results.put, trainer=trainer
        )
        worker.start()
        try:
            # A round's job that comes after an order's does not replace it.
            worker.submit(PrepareUpdate(ORDER, manifest(), TrainingConfig(1, 0.1), 2.0))
            worker.submit(ReadUpdate("b" * 32, describe(b"lost")))
            prepared = results.get(timeout=120)
            assert isinstance(prepared, UpdatePrepared) and prepared.order == ORDER
            failed = results.get(timeout=120)
            assert isinstance(failed, WorkFailed) and failed.fault.code == "update-lost"
            worker.submit(ReadUpdate("b" * 32, prepared.blob))
            read = results.get(timeout=120)
            assert isinstance(read, UpdateRead)
            assert np.linalg.norm(read.contribution.vector) == pytest.approx(2.0)
            assert read.contribution.metrics["examples"] == 3
            worker.submit(PrepareUpdate(ORDER, manifest(2), TrainingConfig(1, 0.1), 2.0))
            missing = results.get(timeout=120)
            assert isinstance(missing, PreparationFailed) and missing.fault.code == "storage"
        finally:
            worker.stop(60.0)


def test_reset_local_parameters_do_not_come_back_with_an_update(tmp_path: Path) -> None:
    update = ready().disk.pending["watch"]
    for model, left in (("other", 1), ("watch", 0), (None, 0)):
        with DeviceStore.open(tmp_path) as store:
            blob = store.blobs.write_pending(b"update")
            store.apply([SavePending(replace(update, blob=blob))])
            store.forget_local(model)
            assert len(store.pending()) == left
            assert store.pending() or not list((tmp_path / "pending").iterdir())


def test_the_owner_sees_what_waits(tmp_path: Path) -> None:
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    update = ready().disk.pending["watch"]
    with DeviceStore.open(state) as store:
        store.apply([SavePending(replace(update, blob=store.blobs.write_pending(b"update")))])
    answer = status(state, running=False)
    assert [each["campaign"] for each in answer["waiting_updates"]] == [ORDER]
    assert "update         of watch v1 waits for a buffer since 2027" in status_text(answer)


def test_in_mode_example_the_order_hides_the_examples() -> None:
    """The noise is added in training: so the order has it, and its buffers must say the same."""
    privacy = PrivacyParameters(
        mode=PrivacyMode.EXAMPLE,
        clip_norm=1.0,
        noise_multiplier=0.0,
        delta=1e-5,
        bits=24,
        example=ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0, sampling_probability=0.1),
    )
    plain = manifest()
    more = (SignatureSpec(name=name, inputs=("x",), outputs=("y",)) for name in sorted(EXAMPLE_SIGNATURES))
    model = plain.model_copy(update={"signatures": (*plain.signatures, *more)})
    device = FakeDevice(policy=PERMISSIVE.model_copy(update={"maximum_example_epsilon": None}))
    device.install(model)
    device.take()
    device.receive(order(model, privacy=privacy))
    (job,) = device.jobs
    assert isinstance(job, PrepareUpdate) and job.config.hidden is not None
    device.work()
    device.take()
    weaker = privacy.model_copy(
        update={"example": ExamplePrivacy(clip_norm=1.0, noise_multiplier=5.0, sampling_probability=0.1)}
    )
    device.receive(invitation(buffer_plan("b" * 32, model, privacy=weaker)))
    assert refusal(device).code == "bad-plan"
    device.receive(invitation(buffer_plan("b" * 32, model, privacy=privacy)))
    assert [type(message) for message in device.take()] == [AdvertiseKeys]
