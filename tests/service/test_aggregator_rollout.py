"""Rollouts as a state machine: waves, gates, soaking, the way back, and who has which version."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.records import Pin
from aggregator.rollout import machine
from aggregator.rollout.gates import Gate, InvalidGate
from aggregator.rollout.machine import (
    Completed,
    Halt,
    Halted,
    Observed,
    Pause,
    Paused,
    Progress,
    Resume,
    RollBack,
    RolledBack,
    RolloutSettings,
    RolloutState,
    Running,
    WaveSight,
    handle,
    reached,
)
from aggregator.rollout.wanted import Reached, own_version, pool
from aggregator.rollout.waves import ordered, reach
from protocol.errors import IllegalEvent

SEED = bytes(range(32))


def settings(*gates: str, soak: float = 0.0, percents: tuple[float, ...] = (5, 25, 100)) -> RolloutSettings:
    return RolloutSettings(
        percents=percents, gates=tuple(map(Gate.parse, gates)), soak_seconds=soak, seed=SEED
    )


def seen(at: float, serving: int, failed: int = 0, waiting: int = 0, **figures: float) -> Observed:
    return Observed(at, WaveSight(serving + failed + waiting, serving, failed, waiting), figures)


def after(rules: RolloutSettings, *events: machine.Event) -> RolloutState:
    state: RolloutState = machine.begin(0.0)
    for event in events:
        state = handle(rules, state, event)
    return state


# --- gates and waves


@pytest.mark.parametrize("text", ["accuracy>=0.8", "loss<0.5", "errors<=0.01", " accuracy > 1 "])
def test_gates_read_as_they_are_written(text: str) -> None:
    gate = Gate.parse(text)
    assert str(gate) == text.replace(" ", "") and Gate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy=0.8", "accuracy<0.8", "errors>=0", "speed>1", "loss<-1", "loss<1;x"]
)
def test_texts_that_are_no_gates_are_refused(text: str) -> None:
    with pytest.raises(InvalidGate):
        Gate.parse(text)


def test_a_figure_that_is_no_number_passes_no_gate() -> None:
    assert not any(Gate.parse(text).holds(float("nan")) for text in ("accuracy>=0", "loss<9", "errors<1"))


@given(
    st.sets(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), min_size=1, max_size=50),
    st.binary(min_size=32, max_size=32),
    st.lists(st.floats(0.1, 99), max_size=4, unique=True),
)
def test_waves_grow_to_the_whole_pool_and_follow_from_the_seed(
    devices: set[str], seed: bytes, percents: list[float]
) -> None:
    rules = RolloutSettings(percents=(*sorted(percents), 100.0), seed=seed)
    names = tuple(sorted(devices))
    waves = [reached(rules, Running(wave=i, since=0), names) for i in range(len(rules.percents))]
    assert waves[0] and set(waves[-1]) == devices
    assert all(after[: len(before)] == before for before, after in pairwise(waves))
    assert ordered(reversed(names), seed) == waves[-1]


def test_a_wave_reaches_at_least_one_and_rounds_up() -> None:
    assert [reach(10, 5), reach(10, 25), reach(200, 5), reach(10, 100), reach(1, 5)] == [1, 3, 10, 10, 1]


@pytest.mark.parametrize("percents", [(5, 25), (25, 5, 100), (50, 50, 100), (), (0, 100), (100, 120)])
def test_waves_that_do_not_rise_to_the_whole_fleet_are_refused(percents: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"100|at least 1 item|greater than 0"):
        RolloutSettings(percents=percents, seed=SEED)


# --- the machine


def test_a_good_version_reaches_everybody() -> None:
    rules = settings()
    assert after(rules, seen(1, 0, waiting=1)) == Running(
        wave=0, since=0, waits_for="1 of 1 devices to try the version"
    )
    assert after(rules, seen(1, 1)) == Running(wave=1, since=1)
    assert after(rules, seen(1, 1), seen(2, 5)) == Running(wave=2, since=2)
    assert after(rules, seen(1, 1), seen(2, 5), seen(3, 20)) == Completed()


def test_a_wave_without_anybody_online_waits() -> None:
    state = after(settings(), Observed(1, WaveSight(3, 0, 0, 0), {}))
    assert isinstance(state, Running) and state.wave == 0 and "come online" in state.waits_for


def test_a_settled_wave_soaks_and_late_devices_do_not_start_it_anew() -> None:
    rules = settings(soak=10)
    state = after(rules, seen(5, 1), seen(14.9, 1, waiting=1))
    assert isinstance(state, Running) and (state.wave, state.settled_at) == (0, 5)
    assert handle(rules, state, seen(15, 1, waiting=1)) == Running(wave=1, since=15)


@pytest.mark.parametrize("waiting", [0, 5])
def test_a_failed_metric_gate_takes_the_version_back_at_once(waiting: int) -> None:
    state = after(settings("accuracy>=0.8"), seen(1, 1, waiting=waiting, accuracy=0.31))
    assert isinstance(state, RolledBack) and state.wave == 0
    assert state.reason == "the gate accuracy>=0.8 failed: accuracy is 0.31"


def test_a_metric_gate_waits_for_an_evaluation() -> None:
    rules = settings("accuracy>=0.8", "loss<1")
    state = after(rules, seen(1, 1), seen(2, 1, accuracy=0.9))
    assert isinstance(state, Running) and state.wave == 0 and "with its loss" in state.waits_for
    assert handle(rules, state, seen(3, 1, accuracy=0.9, loss=0.5)) == Running(wave=1, since=3)


def test_errors_fail_early_only_when_nothing_can_make_them_good() -> None:
    rules = settings("errors<0.2")
    early = after(rules, seen(1, 0, failed=1, waiting=9))  # 1 of 10 may still pass
    assert isinstance(early, Running)
    assert isinstance(handle(rules, early, seen(2, 0, failed=2, waiting=8)), RolledBack)
    # Those that are away count for nothing when the wave is judged.
    assert isinstance(handle(rules, early, Observed(2, WaveSight(10, 3, 1, 0), {})), RolledBack)
    assert handle(rules, early, seen(2, 9, failed=1)) == Running(wave=1, since=2)


def test_a_version_that_nobody_can_run_goes_back_without_any_gate() -> None:
    state = after(settings(), seen(1, 0, failed=2))
    assert isinstance(state, RolledBack) and "none of 2 devices" in state.reason


def test_pause_stops_everything_and_resume_soaks_anew() -> None:
    rules = settings("accuracy>=0.8")
    paused = after(rules, Pause("looking"))
    assert handle(rules, paused, seen(1, 1, accuracy=0.1)) == paused == Paused(wave=0, reason="looking")
    assert handle(rules, paused, Resume(7.0)) == Running(wave=0, since=7.0)


def test_halt_keeps_what_is_there_and_only_a_roll_back_follows() -> None:
    rules, names = settings(), tuple(f"d{i}" for i in range(20))
    halted = after(rules, seen(1, 1), Halt("enough"))
    assert halted == Halted(wave=1, reason="enough") and len(reached(rules, halted, names)) == 5
    back = handle(rules, halted, RollBack("bad"))
    assert isinstance(back, RolledBack) and reached(rules, back, names) == ()


ILLEGAL: list[tuple[RolloutState, machine.Event]] = [
    (Running(wave=0, since=0), Resume(1)),
    (Paused(wave=0, reason=""), Pause()),
    (Halted(wave=0, reason=""), Resume(1)),
    (Halted(wave=0, reason=""), Pause()),
    (Completed(), Pause()),
    (Completed(), Halt()),
    *((RolledBack(wave=0, reason=""), event) for event in (Pause(), Resume(1), Halt(), RollBack())),
]


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_what_cannot_be_done_is_refused(state: RolloutState, event: machine.Event) -> None:
    with pytest.raises(IllegalEvent, match=f"a rollout that is {state.kind} cannot"):
        handle(settings(), state, event)


@pytest.mark.parametrize("state", [Completed(), RolledBack(wave=0, reason=""), Halted(wave=0, reason="")])
def test_what_is_over_takes_no_notice(state: RolloutState) -> None:
    assert handle(settings("errors<0.01"), state, seen(1, 0, failed=9)) == state


def test_progress_notes_every_change_of_status_or_wave_and_survives_its_serial_form() -> None:
    rules, progress = settings(soak=5), Progress.begin(0.0)
    for event in (seen(1, 1), seen(2, 1), seen(6, 1), seen(7, 1, failed=5)):
        progress = progress.after(handle(rules, progress.state, event), event.at)
    progress = progress.after(handle(rules, progress.state, RollBack("bad")), 8.0)
    told = [(step.at, step.what, step.wave) for step in progress.steps]
    assert told == [(0, "running", 0), (6, "running", 1), (8, "rolled-back", 1)]
    assert Progress.from_bytes(progress.to_bytes()) == progress
    assert machine.settings_from(rules.model_dump_json().encode()) == rules


# --- who has which version


def pin(kind: Any, target: str, version: int, at: float = 0.0) -> Pin:
    return Pin("watch", kind, target, version, at)


def test_a_pin_of_the_device_comes_before_a_rollout_and_that_before_a_group() -> None:
    pins = [pin("device", "a", 1), pin("group", "barn", 2), pin("group", "site=north", 3, at=1.0)]
    rollout = Reached(9, frozenset({"a", "b"}))
    assert own_version("a", ["barn"], pins, rollout) == 1
    assert own_version("b", ["barn"], pins, rollout) == 9
    assert own_version("c", ["barn"], pins, rollout) == 2
    assert own_version("c", ["barn", "site=north"], pins, rollout) == 3
    assert own_version("c", [], pins, rollout) is None


def test_a_rollout_passes_over_what_is_pinned() -> None:
    devices = {"a": (), "b": ("barn",), "c": ("barn", "old"), "d": ("old",)}
    pins = [pin("device", "a", 1), pin("group", "old", 1)]
    assert pool(devices, pins, None) == ("b",)
    assert pool(devices, pins, "barn") == ("b", "c")
    assert pool(devices, pins, "old") == ("c", "d")
