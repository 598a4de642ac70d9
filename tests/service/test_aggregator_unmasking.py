"""Unmasking beside the main loop: whoever comes meanwhile is served, and no crash makes two of a sum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.records import Campaign
from aggregator.repository import StorageUnavailable
from protocol.dp.parameters import PrivacyMode
from protocol.plan import MeanQuestion
from protocol.secagg.masking import Mask, apply_masks
from tests.aggregator_bench import Bench
from tests.service.test_aggregator_queries import asked
from tests.toy_rounds import request


@dataclass
class Held(Executor):
    """Jobs wait until the test lets them run."""

    jobs: list[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=list)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        """Runs what waits and was not called off."""
        jobs, self.jobs = self.jobs, []
        for future, job in jobs:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:
                    future.set_exception(error)


def bench(path: Path, devices: int = 5, **options: Any) -> Bench:
    table = Bench(path, devices=devices, **options)
    for number, device in enumerate(table.devices.values()):
        device.values = {"battery": 10.0 * number}
    return table


def until_it_unmasks(table: Bench, held: Held, asks: Any | None = None) -> Campaign:
    campaign = table.start(request() if asks is None else asks)
    table.run_until(lambda: bool(held.jobs))
    return campaign


def test_another_round_goes_on_while_a_sum_is_unmasked(tmp_path: Path) -> None:
    held = Held()
    table = bench(tmp_path, devices=10, beside=held)
    training = until_it_unmasks(table, held, request(cohort=5, minimum=5, min_survivors=5, seed=1))
    (first,) = held.jobs
    held.jobs = []
    query = table.operator.start_query(asked(MeanQuestion()))
    table.run_until(lambda: bool(held.jobs))  # check-in to unmasking, on the same loop
    (view,) = table.operator.rounds(training.campaign_id)
    assert view.record.status == "running"
    held.run()
    table.run_until(lambda: table.operator.campaign(query.campaign_id).status == "finished")
    assert table.operator.rounds(query.campaign_id)[0].record.status == "completed"
    held.jobs = [first]
    held.run()
    (view,) = table.finish(training)
    assert (view.record.status, view.record.version) == ("completed", 2)


@contextmanager
def one_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as beside:
        yield beside


def test_a_check_in_is_answered_while_a_thread_unmasks(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(vector: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
        begun.set()
        assert go_on.wait(120)
        apply_masks(vector, masks)

    with one_thread() as beside:
        table = bench(tmp_path, devices=6, beside=beside, unmask=slow)
        table.hang_up("device-5")
        campaign = table.start(request())
        try:
            table.run_until(begun.is_set)
            turned = table.service.turned
            table.come_back("device-5")
            table.step()
            assert table.operator.device("device-5").online  # durably, and the loop goes round for a watchdog
            assert table.service.turned > turned and not table.transport.unacknowledged
            assert table.rounds()[0].record.status == "running"
        finally:
            go_on.set()
        beside.submit(int).result(60)  # behind the unmasking on the one thread there is
        (view,) = table.finish(campaign)
        assert (view.record.status, view.record.version) == ("completed", 2)


def test_late_answers_and_wills_change_nothing_while_a_sum_is_unmasked(tmp_path: Path) -> None:
    held = Held()
    table = bench(tmp_path, beside=held)
    campaign = until_it_unmasks(table, held)
    with table.repository.read() as reader:
        before = reader.log(table.rounds()[0].record.round_id)
    table.hang_up("device-0")
    table.come_back("device-0")
    for _ in range(100):
        table.step()  # devices repeat themselves
    with table.repository.read() as reader:
        assert reader.log(table.rounds()[0].record.round_id) == before
    assert len(held.jobs) == 1
    held.run()
    (view,) = table.finish(campaign)
    assert len(view.report.survivors) == 5 and view.report.phases[-1].answered == 5


@pytest.mark.parametrize("mode", [PrivacyMode.NONE, PrivacyMode.DISTRIBUTED])
def test_a_crash_while_a_sum_is_unmasked_loses_work_and_nothing_else(
    tmp_path: Path, mode: PrivacyMode
) -> None:
    held = Held()
    table = bench(tmp_path, beside=held)
    campaign = until_it_unmasks(table, held, request(privacy=mode))
    (_, stale), held.jobs = held.jobs[0], []
    table.boot()
    table.run_until(lambda: bool(held.jobs))
    with table.repository.read() as reader:
        assert not reader.ledger()
    held.run()
    (view,) = table.finish(campaign)
    assert (view.record.status, view.record.version) == ("completed", 2)
    with table.repository.read() as reader:
        assert len(reader.ledger()) == 1 and len(table.operator.versions()) == 2
    assert all(device.ends[view.record.round_id].completed for device in table.devices.values())
    with pytest.raises(ValueError, match="no slice"):
        stale()  # what the dead service had begun finds no sum any more


def test_storage_that_fails_in_between_is_tried_again(tmp_path: Path) -> None:
    failures = iter([StorageUnavailable("the disk is away")])

    def unmask(vector: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
        for failure in failures:
            raise failure
        apply_masks(vector, masks)

    held = Held()
    table = bench(tmp_path, beside=held, unmask=unmask)
    campaign = until_it_unmasks(table, held)
    held.run()
    with pytest.raises(StorageUnavailable):
        table.step()
    table.run_until(lambda: bool(held.jobs))
    held.run()
    (view,) = table.finish(campaign)
    assert view.record.status == "completed"


def test_a_sum_that_cannot_be_unmasked_ends_its_round_alone(tmp_path: Path) -> None:
    failures = iter([MemoryError("too large")])

    def unmask(vector: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
        for failure in failures:
            raise failure
        apply_masks(vector, masks)

    table = bench(tmp_path, unmask=unmask)
    first, second = table.finish(table.start(request(rounds=2, privacy=PrivacyMode.DISTRIBUTED)))
    assert (first.record.status, first.record.code) == ("aborted", "release-failed")
    assert second.record.status == "completed"
    with table.repository.read() as reader:
        assert len(reader.ledger()) == 2  # devices were asked: it counts as spent


def test_the_next_round_waits_for_the_version_that_is_being_unmasked(tmp_path: Path) -> None:
    held = Held()
    table = bench(tmp_path, beside=held)
    campaign = until_it_unmasks(table, held, request(rounds=2))
    for _ in range(100):
        table.step()
    assert len(table.rounds()) == 1
    held.run()
    table.run_until(lambda: bool(held.jobs))
    held.run()
    views = table.finish(campaign)
    assert [view.record.base_version for view in views] == [1, 2]


def test_a_campaign_that_is_cancelled_while_a_sum_is_unmasked_gets_it(tmp_path: Path) -> None:
    held = Held()
    table = bench(tmp_path, beside=held)
    campaign = until_it_unmasks(table, held, request(rounds=3))
    table.operator.cancel_campaign(campaign.campaign_id)
    for _ in range(20):
        table.step()
    held.run()
    table.run_until(lambda: table.rounds()[0].record.status != "running")
    (view,) = table.rounds()
    assert view.record.status == "completed"
