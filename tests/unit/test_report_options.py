"""What a demo is asked to do: options are checked, people are split whole, accidents are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("typer")

import typer
from typer.testing import CliRunner

from deploy.demo import run
from deploy.demo.cli import demo
from deploy.demo.options import (
    DemoError,
    DemoOptions,
    Fold,
    KillMoment,
    parse_folds,
    plan_folds,
    plan_kills,
    tolerated_dropouts,
)


@pytest.mark.parametrize(
    ("text", "expected"), [("all", None), (" ALL ", None), ("0", (0,)), ("0,3, 5", (0, 3, 5)), ("1,1", (1,))]
)
def test_folds_are_read(text: str, expected: tuple[int, ...] | None) -> None:
    assert parse_folds(text) == expected


@pytest.mark.parametrize("text", ["", "some", "1,,2", "-1", "1.5"])
def test_other_folds_are_refused(text: str) -> None:
    with pytest.raises(DemoError, match="--folds"):
        parse_folds(text)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1", "127.0.0.1:1883", "mqtt://", "mqtt://user:word@127.0.0.1", "mqtts://user@x"],
)
def test_addresses_with_credentials_or_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(ValidationError):
        DemoOptions(broker=address)


@given(people=st.integers(4, 30), testing=st.integers(1, 5), seed=st.integers(0, 2**62))
def test_folds_split_people_and_test_everybody(people: int, testing: int, seed: int) -> None:
    options = DemoOptions(test_people=testing, folds=None, seed=seed)
    if people - testing < 3:
        with pytest.raises(DemoError):
            plan_folds(options, people)
        return
    folds = plan_folds(options, people)
    assert {person for fold in folds for person in fold.testing} == set(range(people))
    for fold in folds:
        assert sorted(fold.training + fold.testing) == list(range(people))


def test_fewer_devices_are_chosen_by_the_seed() -> None:
    folds = [plan_folds(DemoOptions(devices=4, seed=seed), 10)[0] for seed in (1, 1, 2)]
    assert folds[0] == folds[1] != folds[2]
    assert len(folds[0].training) == 4
    assert 0 not in folds[0].training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DemoOptions(devices=10), "leave 9"),
        (DemoOptions(folds=(10,)), "folds 0 to 9"),
        (DemoOptions(test_people=8), "leave 2"),
    ],
)
def test_impossible_splits_are_refused(options: DemoOptions, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        plan_folds(options, 10)


@given(
    devices=st.integers(3, 40), rounds=st.integers(1, 50), drop=st.floats(0, 0.49), seed=st.integers(0, 2**62)
)
def test_kills_leave_the_threshold_and_time_to_return(
    devices: int, rounds: int, drop: float, seed: int
) -> None:
    options = DemoOptions(drop=drop, seed=seed)
    kills = plan_kills(options, Fold(0, tuple(range(devices)), (99,)), rounds)
    tolerated = tolerated_dropouts(devices)
    assert bool(kills) == (drop > 0 and tolerated > 0)
    for number in {kill.round for kill in kills}:
        victims = [kill.device for kill in kills if kill.round == number]
        assert len(set(victims)) == len(victims) <= tolerated < devices / 2
        assert number < rounds or rounds <= 2


def test_default_kills_one_device_before_and_one_after_its_shares() -> None:
    fold = plan_folds(DemoOptions(), 10)[0]
    kills = plan_kills(DemoOptions(), fold, 12)
    assert [kill.round for kill in kills] == [4, 4, 8, 8]
    assert {kill.moment for kill in kills if kill.round == 4} == set(KillMoment)


def run_command(*arguments: str) -> tuple[int, str]:
    """Runs the command and returns its exit code and output."""
    application = typer.Typer()
    application.command()(demo)
    result = CliRunner().invoke(application, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    return result.exit_code, result.output


def test_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[DemoOptions] = []
    monkeypatch.setattr(run, "run_demo", seen.append)
    code, output = run_command("--devices", "6", "--rounds", "5", "--folds", "all", "--report", str(tmp_path))
    assert code == 0, output
    assert seen == [DemoOptions(devices=6, rounds=5, folds=None, report=tmp_path)]
    assert run_command()[0] == 0
    assert seen[1] == DemoOptions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--broker", "mqtt://user:word@127.0.0.1"), "credentials"),
        (("--folds", "some"), "--folds takes"),
        (("--drop", "0.5"), "0.49"),
        (("--privacy", "much"), "distributed"),
    ],
)
def test_command_refuses_wrong_options(arguments: tuple[str, ...], message: str) -> None:
    code, output = run_command(*arguments)
    assert code == 2
    assert message in output
    assert "user:word" not in output


def test_command_reports_failures_and_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: DemoOptions) -> None:
        raise DemoError("no people")

    def interrupt(options: DemoOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", fail)
    assert run_command() == (1, "demo: no people\n")
    monkeypatch.setattr(run, "run_demo", interrupt)
    assert run_command() == (130, "stopped; nothing is left running\n")


def test_stage_brings_a_broker_and_takes_it_away() -> None:
    with run.stage(DemoOptions()) as stage:
        directory = stage.processes.directory
        assert stage.broker_url.startswith("mqtt://127.0.0.1:")
        assert directory.is_dir()
    assert not directory.exists()
