"""Restarts at every step of a round, failing storage, defects: nothing is lost, nothing is added twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregator.ending import Finisher
from aggregator.registry.artefacts import StoreUnavailable
from aggregator.registry.publishing import document_of
from aggregator.repository import Repository, StorageUnavailable
from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest
from aggregator.transport import Connected, Disconnected
from protocol import topics, transcript
from protocol.codec import encode
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.parameters import PrivacyMode
from protocol.messages import BlobNeed, UploadOffer
from protocol.plan import Deadlines
from protocol.transfer import chunks, describe
from tests.aggregator_bench import Bench
from tests.toy_rounds import check_completed, request

SLOW = Deadlines(
    advertise_keys=60, share_keys=60, masked_input=60, consistency_check=60, unmasking=60, offline_grace=30
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, devices=4, parameters=50_000)
    yield bench
    bench.close()


def campaign_request(**changes: object) -> CampaignRequest:
    return request(cohort=4, deadlines=SLOW, **changes)


def check_versions(bench: Bench, views: list[RoundView]) -> None:
    """Every version number once, every completed round with the version that it published."""
    versions = bench.operator.versions("toy")
    assert [version.version for version in versions] == list(range(1, len(versions) + 1))
    by_round = {version.round_id: version.version for version in versions if version.round_id}
    assert by_round == {v.record.round_id: v.record.version for v in views if v.record.version}


def test_a_restart_at_every_step_loses_nothing(tmp_path: Path) -> None:
    """The service is thrown away after the k-th step, for every k; whatever it was about to send is lost."""
    phases, step, restarted = set(), 0, True
    while restarted:
        step += 1
        path = tmp_path / str(step)
        path.mkdir()
        bench = Bench(path, devices=4, parameters=50_000)
        campaign = bench.start(campaign_request(rounds=2))
        restarted = False
        for number in range(200):
            if number == step:
                bench.clock.now += 0.1
                bench.service.step(0)
                phases.add(bench.phase())
                bench.boot()
                restarted = True
            if bench.operator.campaign(campaign.campaign_id).status == "finished":
                break
            bench.step()
        views = bench.finish(campaign)
        assert len(views) == 2
        for view in views:
            check_completed(bench, view)
            assert len(view.report.survivors) == 4
        check_versions(bench, views)
        bench.close()
    assert phases >= {"AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking", ""}


def test_restarts_again_and_again_lose_nothing(bench: Bench) -> None:
    campaign = bench.start(campaign_request(rounds=2))
    for number in range(60):
        bench.step()
        if number % 3 == 2:
            bench.boot()
    views = bench.finish(campaign)
    for view in views:
        check_completed(bench, view)
    check_versions(bench, views)


def test_chunks_that_are_stored_are_not_asked_for_again(bench: Bench) -> None:
    device = bench.devices["device-0"]
    device.mute = {"blob-chunk"}
    bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == "MaskedInput" and bool(device.blob))
    bench.step()
    device.mute = set()
    # One chunk arrives, then the aggregator is killed.
    need = BlobNeed(blob=describe(device.blob), indices=(0,))
    ((chunk, body),) = list(chunks(need.blob, device.blob, need.indices))
    bench.deliver((topics.up("device-0", "chunk"), encode(chunk, body)))
    bench.clock.now += 0.1
    bench.service.step(0)
    bench.boot()
    asked: list[int] = []
    original = device._upload

    def upload(blob: Any, indices: tuple[int, ...]) -> Any:
        asked.extend(indices)
        return original(blob, indices)

    device._upload = upload  # type: ignore[method-assign]
    bench.run_until(lambda: device.accepted)
    assert 0 not in asked
    assert sorted(set(asked)) == list(range(1, len(set(asked)) + 1))


class FailingStorage:
    """A repository whose commits fail when a test says so."""

    def __init__(self, inner: Repository) -> None:
        self.inner = inner
        self.failing = False
        self.failures = 0

    def read(self) -> Any:
        return self.inner.read()

    @contextmanager
    def write(self) -> Iterator[Any]:
        with self.inner.write() as writer:
            yield writer
            if self.failing:
                self.failures += 1
                raise StorageUnavailable("disk is full")

    def close(self) -> None:
        self.inner.close()


def test_when_the_disk_is_full_nothing_is_acknowledged_and_all_goes_on_later(bench: Bench) -> None:
    storage = FailingStorage(bench.repository)
    bench.service._repository = storage
    campaign = bench.start(campaign_request(rounds=2))
    failed = 0
    for number in range(400):
        storage.failing = number % 3 == 1
        try:
            bench.step()
        except StorageUnavailable:
            failed += 1
            sent = list(bench.transport.sent)
            assert not sent, "nothing may be sent that is not durable"
            bench.transport.reset()
        if bench.operator.campaign(campaign.campaign_id).status == "finished":
            break
    storage.failing = False
    views = bench.finish(campaign)
    assert failed >= 4
    for view in views:
        check_completed(bench, view)
        assert len(view.report.survivors) == 4
    check_versions(bench, views)


def test_a_crash_between_files_and_commit_publishes_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are on disk, the transaction is not: after the restart one version comes of it."""
    storage = FailingStorage(bench.repository)
    bench.service._repository = storage
    campaign = bench.start(campaign_request())
    real = Finisher.finish
    calls = 0

    def finish(self: Finisher, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        real(self, *arguments)
        if calls == 1:
            storage.failing = True

    monkeypatch.setattr(Finisher, "finish", finish)
    with pytest.raises(StorageUnavailable):
        bench.finish(campaign)
    assert (bench.path / "registry" / "models" / "toy" / "2.json").exists()
    assert len(bench.operator.versions("toy")) == 1
    bench.boot()
    (view,) = bench.finish(campaign)
    assert calls == 2
    check_completed(bench, view)
    check_versions(bench, [view])
    on_disk = (bench.path / "registry" / "models" / "toy" / "2.json").read_bytes()
    assert on_disk == document_of(bench.operator.versions("toy")[1]).model_dump_json().encode()


def test_a_release_that_cannot_be_made_aborts_and_still_counts_its_privacy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such release")

    with monkeypatch.context() as patch:
        patch.setattr(Finisher, "_complete", fail)
        (view,) = bench.finish(bench.start(campaign_request()))
    assert (view.record.status, view.record.code) == ("aborted", "release-failed")
    with bench.repository.read() as reader:
        assert [entry.round_id for entry in reader.ledger()] == [view.record.round_id]
    (view,) = bench.finish(bench.start(campaign_request()))
    check_completed(bench, view)


def test_a_message_that_cannot_be_handled_is_dropped_and_the_others_are_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect met by one message must not stop the service, nor come back with every redelivery."""
    real = bench.service._dispatch
    met = 0

    def dispatch(work: Any, device_id: str, message: Any, body: memoryview) -> None:
        nonlocal met
        if isinstance(message, UploadOffer) and message.round_id == "d" * 32:
            met += 1
            raise RuntimeError("a defect")
        real(work, device_id, message, body)

    monkeypatch.setattr(bench.service, "_dispatch", dispatch)
    campaign = bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    poison = UploadOffer(round_id="d" * 32, blob=describe(b"x"))
    bench.deliver((topics.up("device-0", "msg"), encode(poison)))
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert len(view.report.survivors) == 4
    assert met == 2  # with its batch, and alone
    assert bench.transport.unacknowledged == []


def damage(bench: Bench, statement: str) -> None:
    with bench.repository.write() as writer:
        writer._connection.exec_driver_sql(statement)  # type: ignore[attr-defined]


def test_a_round_that_cannot_be_restored_ends_and_does_not_stop_the_others(bench: Bench) -> None:
    bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    damage(bench, "UPDATE versions SET model = 'lost'")
    bench.boot()
    bench.step()
    (view,) = bench.rounds()
    assert (view.record.status, view.record.code) == ("aborted", "not-restorable")
    assert "LostBase" in view.record.detail
    with bench.repository.read() as reader:
        assert reader.ledger() == ()  # nobody was asked to unmask
    damage(bench, "UPDATE versions SET model = 'toy'")
    (view,) = bench.finish(bench.start(campaign_request()))
    check_completed(bench, view)


NOISE = Mechanism.SKELLAM
NOISY = campaign_request(privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("statement", "mechanism"),
    [
        ("UPDATE round_log SET frame = x'00' WHERE kind = 'received'", NOISE),
        ("DELETE FROM versions", Mechanism.NONE),
        ("UPDATE versions SET version = 7", NOISE),
        ("UPDATE rounds SET plan = x'00' WHERE status = 'running'", Mechanism.NONE),
    ],
)
def test_what_a_lost_round_has_spent_is_in_the_ledger_at_its_most(
    bench: Bench, statement: str, mechanism: Mechanism
) -> None:
    """Devices were asked to unmask when the records were damaged: the budget of the round is gone."""
    bench.start(NOISY)
    bench.run_until(lambda: bench.phase() == "Unmasking")
    damage(bench, statement)
    bench.boot()
    bench.step()
    (view,) = bench.rounds()
    assert (view.record.status, view.record.code) == ("aborted", "not-restorable")
    with bench.repository.read() as reader:
        (entry,) = reader.ledger()
        assert entry.round_id == view.record.round_id
        event = DPEvent.model_validate_json(entry.event)
        assert event.mechanism is mechanism
        assert event.survivors == event.minimum_survivors
        stored = reader.transcript(view.record.round_id)
        records = transcript.verify(stored, transcript.GENESIS) if stored else ()
    spent = [r.content.event for r in records if isinstance(r.content, transcript.PrivacyRecord)]
    assert spent == ([event] if records else [])
    for _ in range(30):  # restarts do not count it again
        bench.step()
    bench.boot()
    bench.step()
    with bench.repository.read() as reader:
        assert len(reader.ledger()) == 1


def test_the_next_round_is_refused_when_a_lost_one_has_spent_the_budget(bench: Bench) -> None:
    campaign = bench.start(replace(NOISY, rounds=2, epsilon_limit=8.0))
    bench.run_until(lambda: bench.phase() == "Unmasking")
    damage(bench, "UPDATE rounds SET plan = x'00' WHERE status = 'running'")
    bench.boot()
    (view,) = bench.finish(campaign)
    assert view.record.code == "not-restorable"
    assert bench.operator.campaign(campaign.campaign_id).status == "failed"


def test_a_store_that_fails_costs_a_download_and_no_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device asks for weights while the disk under the registry fails: a round goes on beside it."""
    blob = bench.operator.model("toy").manifest.weights
    campaign = bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == "ShareKeys")

    def fail(*_: Any) -> bytes:
        raise StoreUnavailable("the registry cannot be used: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "read_range", fail)
        need = BlobNeed(blob=blob, indices=(0,))
        bench.deliver((topics.up("device-0", "msg"), encode(need)))
        bench.run_until(lambda: bench.phase() == "MaskedInput")
    assert "cannot have" in caplog.text
    assert bench.transport.resets == 0
    (view,) = bench.finish(campaign)
    check_completed(bench, view)


def test_an_outage_of_the_broker_does_not_count_for_the_phase(bench: Bench) -> None:
    campaign = bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    bench.transport.inbound.append(Disconnected())
    bench.step()
    bench.transport.up, bench.filter = False, lambda message: []
    phase = bench.phase()
    for _ in range(1500):  # 150 s: more than a phase lasts
        bench.step()
    assert bench.phase() == phase
    bench.transport.up, bench.filter = True, lambda message: [message]
    bench.transport.inbound.append(Connected())
    for device in bench.devices.values():
        bench.deliver(device.birth())
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert len(view.report.survivors) == 4
