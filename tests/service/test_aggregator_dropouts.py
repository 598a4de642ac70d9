"""Devices that are silent, gone or unwilling, and rounds that stumble: they end as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aggregator.rounds.events import Event, Tick
from aggregator.running import RunningRound
from aggregator.work import Work
from protocol.codec import encode
from protocol.messages import ClientAbort, Refusal
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing
from tests.toy_rounds import PHASES, REQUEST, check_completed, phase, request

DROPS = {
    "AdvertiseKeys": "advertise-keys",
    "ShareKeys": "share-keys",
    "MaskedInput": "upload-offer",
    "ConsistencyCheck": "consistency-signature",
    "Unmasking": "unmasking-shares",
}


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_stays_silent_is_waited_for_until_the_deadline(bench: Bench, when: str) -> None:
    bench.devices["device-2"].mute = {DROPS[when]}
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ("device-2",)
    assert report.ended is not None
    deadline = 60 if when == "MaskedInput" else 20
    assert deadline <= report.ended - report.started < deadline + 1
    survives = when in ("ConsistencyCheck", "Unmasking")
    assert ("device-2" in view.report.survivors) == survives


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_goes_offline_is_waited_for_no_longer_than_its_grace(bench: Bench, when: str) -> None:
    device = bench.devices["device-2"]
    device.mute = {DROPS[when]}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == when)
    bench.hang_up("device-2")
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ("device-2",)
    assert report.ended is not None
    assert 5 <= report.ended - report.started < 6


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_comes_back_in_time_is_asked_at_once(bench: Bench, when: str) -> None:
    device = bench.devices["device-2"]
    device.mute = {DROPS[when]}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == when)
    bench.hang_up("device-2")
    for _ in range(20):
        bench.step()
    device.mute = set()
    bench.come_back("device-2")
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ()
    assert report.ended is not None
    assert report.ended - report.started < 4.5


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("advertise-keys", "too-few-check-ins"),
        ("share-keys", "too-few-shares"),
        ("upload-offer", "too-few-survivors"),
        ("consistency-signature", "too-few-signatures"),
        ("unmasking-shares", "unmasking-failed"),
    ],
)
def test_too_many_dropouts_abort_the_round_and_the_next_one_runs(
    bench: Bench, message: str, code: str
) -> None:
    campaign = bench.start(request(rounds=2))
    for name in ("device-0", "device-1", "device-2"):
        bench.devices[name].mute = {message}
    bench.run_until(lambda: len(bench.rounds()) == 2)
    for device in bench.devices.values():
        device.mute = set()
    first, second = bench.finish(campaign)
    assert (first.record.status, first.record.code) == ("aborted", code)
    assert first.record.version is None
    check_completed(bench, second)
    assert second.record.version == 2
    with bench.repository.read() as reader:
        spent = {entry.round_id for entry in reader.ledger()}
    # Once devices were asked to unmask, the sum counts as released.
    assert (first.record.round_id in spent) == (code == "unmasking-failed")


def test_when_too_few_are_left_the_others_get_the_whole_time_to_come_back(bench: Bench) -> None:
    gone = ("device-0", "device-1", "device-2")
    for name in gone:
        bench.devices[name].mute = {"upload-offer"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "MaskedInput")
    bench.hang_up(*gone)
    for _ in range(300):
        bench.step()
    assert bench.phase() == "MaskedInput"
    for name in gone:
        bench.devices[name].mute = set()
    bench.come_back(*gone)
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert len(view.report.survivors) == 5


def test_a_device_that_refuses_is_not_waited_for(bench: Bench) -> None:
    def refuse(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if "device-1/" in topic and b'"advertise-keys"' in frame[:120]:
            plan = bench.devices["device-1"].plan
            assert plan is not None
            return [(topic, encode(ClientAbort(round_id=plan.round_id, code="policy")))]
        return [message]

    bench.filter = refuse
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    report = phase(view, "AdvertiseKeys")
    assert report.dropped == ("device-1",)
    assert report.ended is not None
    assert report.ended - report.started < 1
    assert view.report.declined == {"device-1": "policy"}


def test_a_round_that_everybody_refuses_says_why(bench: Bench) -> None:
    def refuse(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if b'"advertise-keys"' not in frame[:120]:
            return [message]
        plan = bench.devices[topic.split("/")[3]].plan
        assert plan is not None
        return [(topic, encode(Refusal(round_id=plan.round_id, code="epsilon", detail="35 over\x1b[31m 30")))]

    bench.filter = refuse
    (view,) = bench.finish(bench.start(REQUEST))
    assert view.record.status == "aborted"
    assert view.record.code == "too-few-check-ins"
    assert view.record.detail.endswith("; 5 declined, 5 of them: epsilon: 35 over [31m 30")


def test_a_round_that_stumbles_is_given_up_and_the_next_one_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = RunningRound.apply

    def stumble(running: RunningRound, work: Work, event: Event) -> None:
        if (
            running.record.number == 1
            and isinstance(event, Tick)
            and running.state.subcohorts[0].cohort is not None
        ):
            raise RuntimeError("a defect")
        apply(running, work, event)

    monkeypatch.setattr(RunningRound, "apply", stumble)
    first, second = bench.finish(bench.start(replace(REQUEST, rounds=2)))
    assert (first.record.status, first.record.code) == ("aborted", "defect")
    assert first.record.detail.startswith("RuntimeError")
    check_completed(bench, second)
