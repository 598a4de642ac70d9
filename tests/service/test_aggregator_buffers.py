"""Buffered campaigns: the real service and real device cores, in simulated time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.operations import OperationRefused
from aggregator.queries import QueryRequest
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument
from protocol.plan import Deadlines, MeanQuestion, Plan
from tests.aggregator_devices import Outgoing
from tests.buffer_bench import BufferBench, buffered
from tests.edge_fleet import PERMISSIVE


def test_a_slow_device_holds_nobody_and_is_still_heard(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [5.0] * 4 + [20.0])
    campaign = bench.start(buffered(12, 3))
    views = bench.finish(campaign)
    for view in views:
        bench.check(view)
    bench.check_once()
    spans = [view.record.ended_at - view.record.started_at for view in views if view.record.ended_at]
    assert max(spans) < 5.0, "nothing is trained in a buffer"
    elapsed = views[-1].record.ended_at - views[0].record.started_at  # type: ignore[operator]
    assert elapsed < 12 * 7.0, "the slow device held the others"
    for view in views:
        assert view.report.buffer is not None and not view.report.buffer.too_old
        told = {each: view.report.buffer.staleness[each] for each in view.report.survivors}
        assert told == bench.staleness(view), "what the devices say"
        assert view.report.ages() == Counter(told.values())
    late = [view for view in views if "device-4" in view.report.survivors]
    assert late, "the slow device was never heard"
    assert all(bench.staleness(view)["device-4"] > 0 for view in late)
    for _ in range(220):  # whoever still trains finds nobody who wants it
        bench.step()
    assert not any(device.core.disk.pending for device in bench.cores.values()), "told that it is over"


def test_updates_that_are_too_old_are_dropped_and_trained_anew(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [2.0, 2.0, 2.0, 20.0])
    views = bench.finish(bench.start(buffered(12, 3, maximum_staleness=2)))
    slow = bench.cores["device-3"].core
    assert "update-dropped" in slow.note_events()
    assert all(age <= 2 for view in views for age in bench.staleness(view).values())
    assert {name for view in views if view.report.buffer for name in view.report.buffer.too_old} == {
        "device-3"
    }
    for view in views:
        bench.check(view)


def test_a_buffer_waits_until_it_is_full_and_says_for_how_many(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0, 1.0])
    campaign = bench.start(buffered(1, 3))
    for _ in range(300):
        bench.step()
    assert not bench.rounds()
    assert bench.operator.campaign(campaign.campaign_id).note == "waiting for updates: 2 of 3 ready"


def test_devices_that_refuse_are_told_of_and_not_asked_all_the_time(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0] * 4)
    for device in bench.cores.values():
        policy = PERMISSIVE.model_copy(update={"privacy_modes": frozenset({PrivacyMode.LOCAL})})
        device.core.profile = replace(device.core.profile, policy=policy)
    campaign = bench.start(buffered(1, 3))
    for _ in range(400):
        bench.step()
    note = bench.operator.campaign(campaign.campaign_id).note
    assert note.startswith("waiting for updates: 0 of 3 ready; 4 refused, 4 of them: privacy-mode")
    refusals = Counter(n.event for d in bench.cores.values() for n in d.core.notes)["plan-refused"]
    assert refusals == 4


def test_a_device_that_comes_back_says_what_it_has(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0, 1.0, 1.0])
    bench.hang_up("device-2")
    bench.start(buffered(1, 3))
    bench.run_until(lambda: len(bench.cores["device-1"].core.disk.pending) == 1)
    bench.hang_up("device-1")
    bench.come_back("device-2")
    bench.run_until(lambda: len(bench.cores["device-2"].core.disk.pending) == 1)
    for _ in range(50):
        bench.step()
    assert not bench.rounds()
    bench.cores["device-1"].kill()
    bench.come_back("device-1")
    bench.run_until(lambda: len(bench.rounds()) == 1 and bench.rounds()[0].record.status == "completed")
    assert bench.cores["device-1"].trained == 1
    bench.check(bench.rounds()[0])


def test_a_kill_of_a_device_at_every_step_uses_no_update_twice(tmp_path: Path) -> None:
    """device-0 is killed after the k-th step, for every k up to the middle of its second buffer."""
    slow = Deadlines(advertise_keys=30, share_keys=30, masked_input=30, consistency_check=30, unmasking=30)
    seen = set()
    for step in range(4, 40, 2):
        path = tmp_path / str(step)
        path.mkdir()
        bench = BufferBench(path, [0.5] * 4)
        campaign = bench.start(buffered(2, 4, deadlines=slow))
        for _ in range(step):
            bench.step()
        victim = bench.cores["device-0"]
        seen.add((victim.core.phase(), bool(victim.core.disk.pending), bool(victim.core.jobs)))
        victim.kill()
        bench.deliver(victim.birth())
        for view in bench.finish(campaign):
            bench.check(view)
            assert len(view.report.survivors) == 4
        bench.check_once()
        bench.close()
    phases = {phase for phase, _, _ in seen}
    assert phases >= {None, "Advertised", "SharesSent", "InputSent", "SetSigned", "Unmasked"}, seen
    assert (None, False, True) in seen, "never killed while it trained"
    assert (None, True, False) in seen, "never killed between training and upload"


def test_a_restart_of_the_service_at_every_step_loses_no_update(tmp_path: Path) -> None:
    restarted, step = True, 0
    phases = set()
    while restarted:
        step += 1
        path = tmp_path / str(step)
        path.mkdir()
        bench = BufferBench(path, [0.5] * 3)
        campaign = bench.start(buffered(1, 3))
        restarted = False
        for number in range(400):
            if number == step:
                bench.clock.now += 0.1
                bench.service.step(0)  # what it is about to send is lost
                phases.add(bench.phase())
                bench.boot()
                restarted = True
            if bench.operator.campaign(campaign.campaign_id).status == "finished":
                break
            bench.step()
        for view in bench.finish(campaign):
            bench.check(view)
            assert view.report.ages() == {0: 3}, step
        bench.check_once()
        bench.close()
    assert phases >= {"AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking", ""}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_losses_and_repetitions_at_random_keep_every_sum_exact(tmp_path: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    bench = BufferBench(tmp_path, [0.5, 0.5, 1.0, 2.0, 6.0])

    def lossy(message: Outgoing) -> list[Outgoing]:
        return [message] * int(chance.choice([0, 1, 2], p=[0.03, 0.94, 0.03]))

    bench.filter = lossy
    campaign = bench.start(buffered(6, 3, minimum=2, min_survivors=2, maximum_staleness=3))
    for _ in range(6000):
        if bench.operator.campaign(campaign.campaign_id).status == "finished":
            break
        bench.step()
        if chance.random() < 0.03:
            victim = bench.cores[f"device-{chance.integers(5)}"]
            victim.kill()
            bench.deliver(victim.birth())
        if chance.random() < 0.01:
            bench.boot()
    views = [view for view in bench.finish(campaign) if view.record.status != "running"]
    completed = [view for view in views if view.record.status == "completed"]
    assert len(views) == 6 and len(completed) >= 3, [view.record.detail for view in views]
    for view in completed:
        bench.check(view)
    bench.check_once()


def test_privacy_is_accounted_for_each_buffer(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0] * 4)
    request = buffered(2, 4, privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=2.0)
    views = bench.finish(bench.start(request))
    with bench.repository.read() as reader:
        assert [entry.round_id for entry in reader.ledger()] == [view.record.round_id for view in views]
    for device in bench.cores.values():
        entries = [item.entry for item in device.core.disk.ledger]
        assert [entry.round_id for entry in entries] == [view.record.round_id for view in views]
        assert all(entry.event.noise_multiplier == pytest.approx(2.0, rel=0.1) for entry in entries)


def test_the_epsilon_limit_stops_a_buffered_campaign(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0] * 4)
    request = buffered(9, 4, privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=1.0, epsilon_limit=8.0)
    campaign = bench.start(request)
    views = bench.finish(campaign)
    assert 1 <= len(views) < 9
    assert bench.operator.campaign(campaign.campaign_id).status == "failed"


def test_a_cancelled_campaign_has_its_updates_erased(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0, 1.0])
    campaign = bench.start(buffered(1, 3))
    bench.run_until(lambda: all(device.core.disk.pending for device in bench.cores.values()))
    bench.operator.cancel_campaign(campaign.campaign_id)
    for _ in range(10):
        bench.step()
    assert not any(device.core.disk.pending for device in bench.cores.values())
    # One that was away learns it when it says what it has.
    again = bench.start(buffered(1, 3))
    bench.run_until(lambda: all(device.core.disk.pending for device in bench.cores.values()))
    bench.hang_up("device-0")
    bench.operator.cancel_campaign(again.campaign_id)
    for _ in range(10):
        bench.step()
    assert bench.cores["device-0"].core.disk.pending
    bench.come_back("device-0")
    for _ in range(10):
        bench.step()
    assert not bench.cores["device-0"].core.disk.pending


def test_other_rounds_run_beside_a_buffered_campaign(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [3.0] * 4)
    for device in bench.cores.values():
        device.core.declare(battery=5.0)
    campaign = bench.start(buffered(5, 3))
    bench.run_until(lambda: len(bench.operator.versions("toy")) >= 2)
    question = QueryRequest(
        "battery", 0.0, 10.0, MeanQuestion(), cohort=4, minimum=3, privacy=PrivacyMode.NONE
    )
    asked = bench.operator.start_query(question)
    bench.run_until(lambda: bench.operator.campaign(asked.campaign_id).status == "finished")
    (answer,) = bench.operator.rounds(asked.campaign_id)
    assert answer.record.status == "completed", answer.record.detail
    for view in bench.finish(campaign):
        bench.check(view)
    bench.check_once()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schedule": "0 2 * * *"}, "no schedule"),
        ({"adaptive_quantile": 0.5, "privacy": PrivacyMode.DISTRIBUTED}, "one clip norm"),
        ({"restart_every": 3, "privacy": PrivacyMode.CENTRAL}, "no noise tree"),
    ],
)
def test_what_does_not_go_with_buffers_is_refused(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(OperationRefused, match=why):
        BufferBench(tmp_path, []).start(buffered(1, 3, **changes))


def test_the_plan_says_what_a_buffer_is(tmp_path: Path) -> None:
    bench = BufferBench(tmp_path, [1.0] * 3)
    campaign = bench.start(buffered(1, 3))
    (view,) = bench.finish(campaign)
    plan = Plan.from_bytes(SignedDocument.model_validate_json(view.record.plan).payload)
    assert plan.task.kind == "train" and plan.task.order == campaign.campaign_id
    assert plan.task.training.maximum_staleness == 8 and plan.deadlines.masked_input == 60.0
