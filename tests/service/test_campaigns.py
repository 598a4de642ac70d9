"""Campaigns over time: schedules, pauses, cancellations, and several of them side by side."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aggregator.operations import NoSuch, OperationRefused
from aggregator.schedule import Schedule
from aggregator.work import Work
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_bench import START, Bench
from tests.aggregator_devices import model_files
from tests.service.test_aggregator_cli import model, run  # noqa: F401 (fixtures)
from tests.toy_rounds import request


def utc(*figures: int) -> float:
    return dt.datetime(*figures, tzinfo=dt.UTC).timestamp()  # type: ignore[arg-type,misc]


NIGHTLY = Schedule(cron="30 2 * * *", zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("moment", "fires"),
    [
        (utc(2026, 7, 1, 0, 29), utc(2026, 7, 1, 0, 30)),  # 2:30 in summer
        (utc(2026, 7, 1, 0, 30), utc(2026, 7, 2, 0, 30)),  # after, not at
        (utc(2026, 1, 1, 0, 30), utc(2026, 1, 1, 1, 30)),  # 2:30 in winter
        (utc(2026, 3, 28, 12), utc(2026, 3, 29, 1, 0)),  # there is no 2:30 in this night: 3:00
        (utc(2026, 10, 24, 12), utc(2026, 10, 25, 0, 30)),  # there are two: the first
        (utc(2026, 10, 25, 0, 30), utc(2026, 10, 26, 1, 30)),  # and not the second
    ],
)
def test_a_schedule_fires_in_its_time_zone(moment: float, fires: float) -> None:
    assert NIGHTLY.after(moment) == fires
    assert str(NIGHTLY) == "30 2 * * * (Europe/Berlin)"


@pytest.mark.parametrize(
    ("cron", "zone", "why"),
    [
        ("0 2 * *", "UTC", "cron expression"),
        ("@daily; rm", "UTC", "cron expression"),
        ("0 0 30 2 *", "UTC", "cron expression|never"),
        ("0 2 * * *", "Atlantis/Capital", "time zone"),
        ("0 2 * * *", "../../etc/passwd", "pattern"),
    ],
)
def test_what_is_no_schedule_says_why(cron: str, zone: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Schedule(cron=cron, zone=zone)


def status(bench: Bench, campaign_id: str) -> str:
    return bench.operator.campaign(campaign_id).status


def wait(bench: Bench, seconds: float) -> None:
    """Time passes; fast where nothing is to happen."""
    end = bench.clock.now + seconds
    while bench.clock.now < end:
        bench.step(1.0)


def test_a_scheduled_campaign_runs_a_round_each_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=2, schedule="*/2 * * * *"))
    assert campaign.due_at == START + 120
    wait(bench, 110)
    assert bench.rounds() == [] and status(bench, campaign.campaign_id) == "waiting"
    wait(bench, 30)
    (first,) = bench.rounds()
    assert START + 120 <= first.record.started_at <= START + 122
    assert bench.operator.campaign(campaign.campaign_id).due_at == START + 240
    views = bench.finish(campaign)
    assert [view.record.status for view in views] == ["completed", "completed"]
    assert START + 240 <= views[1].record.started_at <= START + 242


def test_what_was_missed_comes_to_one_round(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=5, schedule="*/2 * * * *"))
    # The service is down for most of a day.
    bench.clock.now += 80_000
    bench.boot()
    wait(bench, 30)
    (only,) = bench.rounds()
    assert only.record.status == "completed"
    due = bench.operator.campaign(campaign.campaign_id).due_at
    assert due is not None and START + 80_000 < due <= START + 80_000 + 120


def test_a_firing_waits_for_devices_and_is_not_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.hang_up(*bench.devices)
    campaign = bench.start(request(rounds=5, schedule="*/2 * * * *"))
    wait(bench, 300)
    assert bench.rounds() == []
    assert "waiting for devices" in bench.operator.campaign(campaign.campaign_id).note
    bench.come_back(*bench.devices)
    wait(bench, 45)
    assert len(bench.rounds()) == 1


def test_a_campaign_that_waits_for_its_time_lets_others_train(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    nightly = bench.start(request(rounds=3, schedule="0 * * * *"))
    (view,) = bench.finish(bench.start(request()))
    assert view.record.status == "completed" and view.record.version == 2
    assert status(bench, nightly.campaign_id) == "waiting"


def test_a_paused_campaign_ends_its_round_and_begins_no_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=3))
    bench.run_until(lambda: bench.phase() == "MaskedInput")
    paused = bench.operator.pause_campaign(campaign.campaign_id)
    assert paused.status == "paused"
    wait(bench, 40)
    (view,) = bench.rounds()
    assert view.record.status == "completed" and status(bench, campaign.campaign_id) == "paused"
    bench.boot()
    wait(bench, 60)
    assert len(bench.rounds()) == 1
    assert bench.operator.campaigns(active=True)[0].status == "paused"
    assert bench.operator.resume_campaign(campaign.campaign_id).status == "running"
    views = bench.finish(campaign)
    assert [each.record.status for each in views] == ["completed"] * 3


def test_what_a_pause_swallows_is_not_made_up_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=3, schedule="*/2 * * * *"))
    bench.operator.pause_campaign(campaign.campaign_id)
    wait(bench, 300)
    assert bench.rounds() == []
    resumed = bench.operator.resume_campaign(campaign.campaign_id)
    assert resumed.status == "waiting" and resumed.due_at == START + 360
    wait(bench, 20)
    assert bench.rounds() == []


@pytest.mark.parametrize("mode", [PrivacyMode.NONE, PrivacyMode.DISTRIBUTED])
@pytest.mark.parametrize("phase", ["AdvertiseKeys", "ShareKeys", "MaskedInput"])
def test_a_cancelled_campaign_aborts_its_round(tmp_path: Path, phase: str, mode: PrivacyMode) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=3, privacy=mode))
    bench.run_until(lambda: bench.phase() == phase)
    bench.operator.cancel_campaign(campaign.campaign_id)
    wait(bench, 10)
    (view,) = bench.rounds()
    assert (view.record.status, view.record.code) == ("aborted", "cancelled")
    assert all(device.ends[view.record.round_id].reason == "cancelled" for device in bench.devices.values())
    assert status(bench, campaign.campaign_id) == "cancelled"
    with bench.repository.read() as reader:
        assert reader.ledger() == ()  # nothing was unmasked: nothing is spent
    # The devices are free for others.
    (after,) = bench.finish(bench.start(request()))
    assert after.record.status == "completed"


def test_a_round_whose_privacy_is_spent_is_let_finish(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=3, privacy=PrivacyMode.DISTRIBUTED))
    bench.run_until(lambda: bench.phase() == "Unmasking")
    bench.operator.cancel_campaign(campaign.campaign_id)
    wait(bench, 30)
    (view,) = bench.rounds()
    assert view.record.status == "completed" and status(bench, campaign.campaign_id) == "cancelled"


def test_a_pause_that_comes_between_a_look_and_a_start_counts(tmp_path: Path) -> None:
    """The service has read its campaigns when the operator pauses one: no round begins all the same."""
    bench = Bench(tmp_path)
    wait(bench, 5)
    campaign = bench.start(request(rounds=1))
    seen = bench.operator.campaigns(active=True)
    bench.operator.pause_campaign(campaign.campaign_id)
    with Work(bench.repository, bench.clock.moment()) as work:
        bench.service._conductor.serve_campaigns(work, seen)
    assert bench.rounds() == [] and status(bench, campaign.campaign_id) == "paused"
    bench.operator.resume_campaign(campaign.campaign_id)
    with Work(bench.repository, bench.clock.moment()) as work:
        bench.service._conductor.serve_campaigns(work, seen)
    assert len(bench.rounds()) == 1


def test_campaigns_of_several_models_run_side_by_side(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=10)
    bench.operator.publish(*model_files(1000, name="other", seed=7))
    campaigns = [bench.start(request(rounds=2)), bench.start(request(model="other", rounds=2))]
    bench.run_until(lambda: len(bench.operator.live_rounds()) == 2, seconds=60)
    running = [view.record for view in bench.rounds()]
    assert {record.model for record in running} == {"toy", "other"}
    assert not set(running[0].invited) & set(running[1].invited)
    for campaign in campaigns:
        assert [view.record.status for view in bench.finish(campaign)] == ["completed", "completed"]
    newest = {(version.model, version.version) for version in bench.operator.versions()}
    assert {("toy", 3), ("other", 3)} <= newest


def test_only_one_campaign_at_a_time_trains_a_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=10)
    first, second = bench.start(request()), bench.start(request())
    bench.run_until(lambda: bool(bench.operator.live_rounds()))
    wait(bench, 1)
    assert len(bench.operator.live_rounds()) <= 1
    bench.finish(first)
    bench.finish(second)
    assert [view.record.base_version for view in bench.rounds()] == [1, 2]


def test_only_what_goes_on_can_be_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    operator, campaign = bench.operator, bench.start(request())
    with pytest.raises(OperationRefused, match="only one that is paused"):
        operator.resume_campaign(campaign.campaign_id)
    bench.finish(campaign)
    for refused in (operator.pause_campaign, operator.resume_campaign, operator.cancel_campaign):
        with pytest.raises(OperationRefused, match="is finished"):
            refused(campaign.campaign_id)
        with pytest.raises(NoSuch, match="covey campaign list"):
            refused("0" * 32)


def test_the_commands(run: Any, model: Path, tmp_path: Path) -> None:  # noqa: F811
    run("aggregator", "init")
    run("model", "publish", model)
    assert "no campaigns yet" in run("campaign", "list")[1]
    plan = tmp_path / "plan.json"
    code, out, _ = run(
        "privacy", "plan", "--population", 100, "--cohort", 40, "--rounds", 50, "--epsilon", 8, "--json"
    )
    assert code == 0
    plan.write_text(out)
    create = ("campaign", "create", "--model", "toy", "--privacy", plan, "--schedule", "0 2 * * *")
    code, out, err = run(
        *create, "--time-zone", "Europe/Berlin", "--where", "power=mains,label=site:barn", "--json"
    )
    assert code == 0, err
    (campaign,) = json.loads(out)
    assert (campaign["rounds"], campaign["schedule"]) == (50, "0 2 * * * (Europe/Berlin)")
    assert (campaign["where"], campaign["status"]) == ("power=mains,label=site=barn", "waiting")
    assert "next round at" in run("campaign", "list")[1]
    short = campaign["campaign"][:8]
    shown = json.loads(run("campaign", "show", short, "--json")[1])
    assert shown["campaigns"] == [campaign] and shown["rounds"] == []
    for command, becomes in (("pause", "paused"), ("resume", "waiting"), ("cancel", "cancelled")):
        code, out, _ = run("campaign", command, short, "--json")
        assert (code, json.loads(out)[0]["status"]) == (0, becomes)
    code, _, err = run("campaign", "resume", short)
    assert code == 1 and "is cancelled" in err
    assert run("campaign", "show", "nothing")[0] == 1
    code, out, _ = run("audit-log", "--json")
    actions = [entry["action"] for entry in json.loads(out)]
    assert {"pause-campaign", "resume-campaign", "cancel-campaign", "start-campaign"} <= set(actions)
    code, _, err = run("campaign", "create", "--model", "toy", "--privacy", tmp_path / "missing.json")
    assert code == 2 and "one of none" in err
    for wrong, why in (
        (("--privacy", model / "manifest.json"), "privacy plan --json"),
        (("--schedule", "every night"), "cron"),
        (("--where", "moon=full"), "devices say no moon"),
    ):
        code, _, err = run("campaign", "create", "--model", "toy", *wrong)
        assert code == 1 and why in err, err


def test_a_plan_gives_the_campaign_its_privacy(run: Any, tmp_path: Path) -> None:  # noqa: F811
    from aggregator.cli_training import PlannedPrivacy

    arguments = ("--population", 100, "--cohort", 40, "--rounds", 50, "--epsilon", 8, "--json")
    plan = tmp_path / "plan.json"
    plan.write_text(run("privacy", "plan", *arguments)[1])
    planned = PlannedPrivacy.load(plan)
    assert (planned.mode, planned.rounds, planned.cohort) == (PrivacyMode.DISTRIBUTED, 50, 40)
    assert planned.noise_multiplier == json.loads(plan.read_text())["noise_multiplier"]
    plan.write_text(run("privacy", "plan", *arguments, "--colluders", 3)[1])
    assert PlannedPrivacy.load(plan).colluders == 3
    plan.write_text(run("privacy", "plan", *arguments, "--noise", "discrete_gaussian")[1])
    with pytest.raises(OperationRefused, match="noise"):
        PlannedPrivacy.load(plan)
    plan.write_text(run("privacy", "plan", *arguments, "--mode", "example", "--sampling", 0.05)[1])
    planned = PlannedPrivacy.load(plan)
    assert (planned.mode, planned.cohort, planned.sampling_probability) == (PrivacyMode.EXAMPLE, None, 0.05)
