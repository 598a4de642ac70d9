"""What `covey query` refuses, and how answers look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregator import cli_answers
from aggregator import main as covey
from aggregator.rounds.answer import Answer, HistogramAnswer, NumberAnswer, QuantileAnswer
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selector import written
from aggregator.settings import seed_of
from aggregator.web.schemas import Round
from protocol.dp.parameters import PrivacyMode
from protocol.plan import Deadlines, HistogramQuestion, MeanQuestion, QuantileQuestion, QueryTask, Question
from tests.service.test_aggregator_cli import model, run

__all__ = ["model", "run"]

Run = Callable[..., tuple[int, str, str]]
BOUNDS = ("--low", 0, "--high", 80)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("mean", "battery", "--low", 80, "--high", 0), 1, "not below"),
        (("mean", "battery", "--low", "nan", "--high", 80), 1, "low"),
        (("mean", "battery", "--low", 0, "--high", "inf"), 1, "high"),
        (("mean", "Battery Temperature", *BOUNDS), 1, "field"),
        (("histogram", "battery", *BOUNDS, "--bins", 0), 2, "bins"),
        (("histogram", "battery", *BOUNDS, "--bins", 10**9), 2, "bins"),
        (("quantile", "battery", *BOUNDS, "--q", 1.5), 2, "q"),
        (("mean", "battery", *BOUNDS, "--cohort", 5, "--minimum", 6), 1, "minimum"),
        (("mean", "battery", *BOUNDS, "--epsilon", 1, "--privacy", "none"), 1, "without noise"),
        (("mean", "battery", *BOUNDS, "--privacy", "example"), 1, "one value"),
        (("mean", "battery", *BOUNDS, "--privacy", "none", "--colluders", 1), 1, "mode distributed"),
        (("mean", "battery", *BOUNDS, "--cohort", 5, "--colluders", 4), 1, "colluders"),
        (("mean", "battery", *BOUNDS, "--where", "moon=full"), 1, "devices say no moon"),
        (("mean", "battery", *BOUNDS, "--input-seconds", 1e9), 2, "masked_input"),
        (("quantile", "battery", *BOUNDS, "--q", "nan"), 2, "q"),
        (("mean", "battery"), 2, "--low"),
        (("show", "abc"), 1, "covey query list"),
        (("cancel", "abc"), 1, "covey query list"),
    ],
)
def test_what_is_refused_before_anybody_is_asked(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], code: int, says: str
) -> None:
    run("aggregator", "init")
    found, _, errors = run("query", *arguments)
    assert (found, says in errors) == (code, True), errors
    with covey.open_operator(tmp_path / "state") as operator:
        assert not operator.campaigns()


def test_a_query_waits_for_the_service(run: Run) -> None:
    run("aggregator", "init")
    assert run("query", "list")[1].startswith("no queries yet")
    code, _, errors = run("query", "mean", "battery", *BOUNDS)
    assert code == 0 and "no aggregator is running" in errors
    assert "mean of battery" in run("query", "list")[1]
    assert "1 rounds of mean of battery begun" in run("round", "status")[1]


ROUND = (
    "--cohort", 30, "--minimum", 12, "--min-survivors", 8, "--subcohort-limit", 15,
    "--privacy", "distributed", "--noise-multiplier", 2, "--colluders", 3, "--delta", 1e-6,
    "--max-epsilon", 4, "--seed", 7,
    "--where", "power=mains", "--gather", 5, "--advertise-seconds", 11, "--share-seconds", 12,
    "--input-seconds", 13, "--check-seconds", 14, "--unmask-seconds", 15, "--offline-grace", 16,
)  # fmt: skip
"""Every option that a round has, whatever it asks."""


@pytest.mark.parametrize(
    "command",
    [
        ("query", "mean", "battery", *BOUNDS),
        ("query", "quantile", "battery", *BOUNDS, "--q", 0.9),
        ("evaluate", "toy"),
        ("round", "start", "--model", "toy"),
        ("campaign", "create", "--model", "toy"),
    ],
)
def test_the_options_of_a_round_are_the_same_whatever_it_asks(
    run: Run, model: Path, tmp_path: Path, command: tuple[object, ...]
) -> None:
    run("aggregator", "init")
    run("model", "publish", model)
    code, _, errors = run(*command, *ROUND)
    assert code == 0, errors
    with covey.open_operator(tmp_path / "state") as operator:
        (campaign,) = operator.campaigns()
    settings = CampaignSettings.from_bytes(campaign.settings)
    cohort, privacy = settings.cohort, settings.privacy
    assert (cohort.size, cohort.minimum, cohort.minimum_survivors, cohort.subcohort_limit) == (30, 12, 8, 15)
    assert (privacy.mode, privacy.noise_multiplier, privacy.colluders) == (PrivacyMode.DISTRIBUTED, 2.0, 3)
    assert (privacy.delta, settings.epsilon_limit, settings.gather_seconds) == (1e-6, 4.0, 5.0)
    assert (written(settings.where), settings.selection_seed) == ("power=mains", seed_of(7))
    assert settings.deadlines == Deadlines(
        advertise_keys=11,
        share_keys=12,
        masked_input=13,
        consistency_check=14,
        unmasking=15,
        offline_grace=16,
    )


def test_a_query_is_called_off(run: Run, model: Path) -> None:
    run("aggregator", "init")
    run("model", "publish", model)
    run("query", "mean", "battery", *BOUNDS)
    run("evaluate", "toy")
    query, evaluation = json.loads(run("campaign", "list", "--json")[1])
    code, _, errors = run("query", "cancel", evaluation["campaign"])
    assert code == 1 and "no query begins" in errors  # of another kind: `covey campaign cancel`
    code, out, _ = run("query", "cancel", query["campaign"][:8], "--json")
    assert (code, json.loads(out)["status"]) == (0, "cancelled")
    code, _, errors = run("query", "cancel", query["campaign"])
    assert code == 1 and "is cancelled" in errors
    code, _, errors = run("query", "show", query["campaign"])
    assert code == 3 and "cancelled" in errors
    assert "cancelled" in run("query", "list")[1]
    actions = [(each["action"], each["outcome"]) for each in json.loads(run("audit-log", "--json")[1])]
    assert ("cancel-campaign", "done") in actions


def shown(question: Question, figures: NumberAnswer | HistogramAnswer | QuantileAnswer) -> None:
    task = QueryTask(field="battery", low=0.0, high=80.0, question=question)
    answer = Answer(task=task, participants=4, epsilon=1.234, figures=figures)
    report = RoundReport(answer=answer, declined={"d": "unknown-field: none"}, epsilon=2.5, delta=1e-5)
    round_ = Round(
        round="a" * 32,
        campaign="c" * 32,
        number=1,
        model=None,
        base_version=None,
        version=None,
        status="completed",
        code="",
        detail="",
        invited=("a", "b", "c", "d", "e"),
        started_at=1.0,
        ended_at=2.0,
        report=report,
    )
    cli_answers.answer(round_, answer)


def test_a_number_has_the_digits_that_its_error_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    shown(MeanQuestion(), NumberAnswer(estimate=27.123456, standard_error=0.52, low=26.1, high=28.1))
    out = capsys.readouterr().out
    assert "mean of battery  27.12" in out and "27.123" not in out
    assert "26.1 to 28.1" in out and "4 of 5 invited; declined: 1 unknown-field" in out
    assert "1.23 by this query, at delta 1e-05; 2.5 by everything" in out


def test_a_histogram_is_drawn_and_negative_counts_are_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    figures = HistogramAnswer(edges=(0.0, 40.0, 80.0), counts=(5.5, -1.5), standard_error=1.0)
    shown(HistogramQuestion(bins=2), figures)
    first, second = (line for line in capsys.readouterr().out.splitlines() if "0 to" in line)
    assert "█" in first and "█" not in second
    assert "5.5" in first and "-1.5" in second


def test_a_quantile_names_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    figures = QuantileAnswer(estimate=31.0, low=28.75, high=33.75, resolution=1.25)
    shown(QuantileQuestion(q=0.9, bins=64), figures)
    out = capsys.readouterr().out
    assert "quantile of battery at 0.9  31.0" in out and "28.75 to 33.75" in out and "1.25" in out
