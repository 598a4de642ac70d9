"""Who is chosen: by circumstances, fairly over time, and so that anybody can draw again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.evaluations import EvaluationRequest
from aggregator.operations import NoSuch, OperationRefused
from aggregator.records import Device
from aggregator.rounds.selection import Selection, places, select
from aggregator.rounds.selector import InvalidSelector, fits, parse, written
from aggregator.rounds.subcohort_state import FULL
from protocol import topics
from protocol.codec import encode
from protocol.conditions import Conditions
from protocol.dp.parameters import PrivacyMode
from protocol.messages import DeviceStatus
from tests.aggregator_bench import Bench
from tests.toy_rounds import request

DEVICE = Device(
    "barn-1",
    b"",
    0.0,
    client_version="0.10.2",
    labels=("barn", "site=north"),
    conditions=Conditions(power="mains", battery=80, temperature=51.5, metered=False, examples=100),
)


@pytest.mark.parametrize(
    ("text", "takes"),
    [
        ("", True),
        ("power=mains", True),
        ("power=battery", False),
        ("battery>=80", True),
        ("battery>80", False),
        ("battery=80, temperature<60", True),
        ("temperature<=51", False),
        ("load<1", False),  # it did not say
        ("idle_hours>=0", False),
        ("metered=no", True),
        ("metered=yes", False),
        ("examples>=100", True),
        ("examples>=1000", False),
        ("client>=0.9", True),  # by its numbers, not its letters
        ("client<0.10.2", False),
        ("label=barn", True),
        ("label=site:north,label!=spare", True),
        ("label=site=south", False),
        ("label!=barn", False),
        ("power=mains,battery>=50,label=site:barn", False),
    ],
)
def test_a_device_fits_every_clause(text: str, takes: bool) -> None:
    clauses = parse(text)
    assert fits(clauses, DEVICE) is takes
    assert parse(written(clauses)) == clauses


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("power=solar", "mains"),
        ("battery", "no clause"),
        ("battery=full", "no number"),
        ("battery>=1e300", "less than"),
        ("battery>=nan", "less than"),
        ("metered=maybe", "not what metered"),
        ("metered!=yes", "not what metered"),
        ("moon=full", "they say power"),
        ("client>=new", "pattern"),
        ("label=<script>", "pattern"),
        ("power=mains;drop", "mains"),
        ("label>=a", "not what label"),
        (",", "no clause"),
        (",".join(["label=a"] * 33), "at most 32"),
    ],
)
def test_what_is_no_selector_says_why(text: str, why: str) -> None:
    with pytest.raises(InvalidSelector, match=why):
        parse(text)


names = st.sets(st.integers(0, 99).map(lambda number: f"d-{number}"), min_size=1)


@given(pool=names, yielding=names, count=st.integers(1, 120), seed=st.binary(min_size=32, max_size=32))
def test_who_yields_gets_only_what_the_others_leave(
    pool: set[str], yielding: set[str], count: int, seed: bytes
) -> None:
    record = Selection(
        seed=seed, places=count, pool=tuple(sorted(pool)), yielding=tuple(sorted(pool & yielding))
    )
    chosen = set(record.chosen)
    assert len(chosen) == min(count, len(pool))
    assert not chosen & yielding or pool - yielding <= chosen
    assert Selection.from_bytes(record.to_bytes()).chosen == record.chosen
    assert record.chosen == select(sorted(pool, reverse=True), count, seed, frozenset(yielding))


def test_places() -> None:
    assert [places(10, 1.0), places(10, 1.3), places(3, 1.1), places(2**14, 2.0)] == [10, 13, 4, 2**14]


def said(bench: Bench, name: str, conditions: Conditions) -> None:
    """A device says what it is in."""
    device = bench.devices[name]
    status = DeviceStatus(session=device.session, online=True, models={}, conditions=conditions)
    bench.deliver((topics.up(name, "status"), encode(status)))
    bench.step()


def test_a_round_invites_whoever_fits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=8)
    for number, name in enumerate(bench.devices):
        said(bench, name, Conditions(power="mains" if number < 4 else "battery", battery=10 * number))
    campaign = bench.start(request(where="power=mains,battery>=10", minimum=4, min_survivors=3, cohort=4))
    bench.run_until(lambda: bool(bench.operator.campaign(campaign.campaign_id).note), seconds=20)
    note = bench.operator.campaign(campaign.campaign_id).note
    assert note == "waiting for devices: 3 of at least 4 online that fit power=mains,battery>=10"
    assert bench.rounds() == []
    said(bench, "device-7", Conditions(power="mains", battery=70))
    (view,) = bench.finish(campaign)
    assert view.record.invited == ("device-1", "device-2", "device-3", "device-7")
    assert view.record.status == "completed"


def test_turns_are_fair_recorded_and_can_be_drawn_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=9)
    views = bench.finish(bench.start(request(rounds=4, cohort=3, rest_rounds=2)))
    turns = [set(view.record.invited) for view in views]
    # Three rounds take everybody once; the fourth takes again whoever had the first turn.
    assert turns[0] | turns[1] | turns[2] == set(bench.devices) and turns[3] == turns[0]
    for number, view in enumerate(views):
        drawn = bench.operator.selection(view.record.round_id)
        assert drawn.chosen == view.record.invited and drawn.seed == view.record.selection_seed
        assert set(drawn.pool) == set(bench.devices)
        assert set(drawn.yielding) == set().union(*turns[max(0, number - 2) : number])
    with pytest.raises(NoSuch, match="no record"):
        bench.operator.selection("0" * 32)


def test_more_are_invited_than_make_the_roster(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=8)
    slow = {"device-0", "device-1", "device-2"}
    bench.filter = lambda message: (
        [] if message[0].split("/")[3] in slow and message[0].endswith("msg") else [message]
    )
    campaign = bench.start(request(cohort=5, over_select=1.6, minimum=5, min_survivors=5))
    (view,) = bench.finish(campaign, seconds=30)
    # The slow ones cost no time: their places are taken, and they are free at once.
    assert len(view.record.invited) == 8
    assert view.record.status == "completed"
    assert set(view.report.survivors) == set(bench.devices) - slow
    assert view.report.phases[0].dropped == () and view.report.phases[0].expected == 5
    assert {name for name, why in view.report.declined.items() if why == FULL} == slow
    for name in slow:
        # Sent away when the roster was full, and told once more when the round was over.
        assert bench.devices[name].received.count("round-end") == 2


def test_a_full_roster_is_the_same_after_a_crash(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=8)
    campaign = bench.start(request(cohort=5, over_select=1.6))
    bench.run_until(lambda: bench.phase() == "MaskedInput", seconds=30)
    bench.boot()
    (view,) = bench.finish(campaign)
    assert view.record.status == "completed" and len(view.report.survivors) == 5
    assert sum(why == FULL for why in view.report.declined.values()) == 3


def test_evaluations_prefer_or_demand_who_never_trained(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=8)
    for device in bench.devices.values():
        device.figures = {"loss": 1.0, "accuracy": 0.5, "examples": 40.0}
    (view,) = bench.finish(bench.start(request(cohort=4)))
    trained = set(view.report.survivors)
    asked = EvaluationRequest("toy", version=2, cohort=4, privacy=PrivacyMode.NONE)
    (view,) = bench.finish(bench.operator.start_evaluation(asked))
    assert set(view.record.invited) == set(bench.devices) - trained
    assert view.report.evaluation is not None and view.report.evaluation.held_out == 4
    (view,) = bench.finish(bench.operator.start_evaluation(replace(asked, cohort=6)))
    assert view.report.evaluation is not None and view.report.evaluation.held_out == 4
    campaign = bench.operator.start_evaluation(replace(asked, cohort=6, held_out=True))
    bench.run_until(lambda: bool(bench.operator.campaign(campaign.campaign_id).note), seconds=20)
    assert "4 of at least 5 online that have never trained toy" in (
        bench.operator.campaign(campaign.campaign_id).note
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"where": "moon=full"}, "where: 'moon=full'"),
        ({"over_select": 0.5}, "over_select"),
        ({"rest_rounds": -1}, "rest_rounds"),
        ({"over_select": 1.3, "cohort": 40, "subcohort_limit": 20}, "split"),
    ],
)
def test_what_no_campaign_can_ask_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(OperationRefused, match=why):
        Bench(tmp_path, devices=0).start(request(**changes))
