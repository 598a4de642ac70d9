"""`covey privacy`: figures that others published, refusals before any data, and the ledger's audit."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("dp_accounting")

from aggregator import cli
from aggregator import main as covey
from aggregator.privacy.forecast import Intention, forecast
from aggregator.privacy.ledger import audit_ledger
from aggregator.privacy.references import tree_noise_multiplier
from protocol.dp.errors import CohortTooSmall, InvalidParameters, PrivacyError, RingTooNarrow
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_bench import Bench
from tests.toy_rounds import request as campaign_request

KEYS = [
    "noise_multiplier",
    "epsilon_per_round",
    "epsilon_total",
    "delta",
    "clip_norm",
    "scale",
    "bits",
    "scaled_l2",
    "local_stddev",
    "min_survivors",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs `covey privacy ...`; returns (exit code, output, errors)."""
    monkeypatch.setenv("COVEY_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["covey", "privacy", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def plan(run: Any, arguments: str) -> dict[str, Any]:
    code, out, err = run("plan", *arguments.split(), "--json")
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def test_the_plan_of_the_tracker(run) -> None:  # type: ignore[no-untyped-def]
    arguments = "--population 5000 --cohort 200 --rounds 500 --epsilon 4 --delta 1e-6 --bits 16"
    content = plan(run, arguments)
    assert list(content)[: len(KEYS)] == KEYS
    assert 3.999 < content["epsilon_total"] <= 4
    assert content["epsilon_per_round"] < content["epsilon_total"] / 20
    assert (content["bits"], content["delta"], content["min_survivors"]) == (16, 1e-6, 134)
    assert content["bytes_per_device"] == 50_000 * 16 / 8
    assert content["local_stddev"] == pytest.approx(
        content["noise_multiplier"] * content["scaled_l2"] / math.sqrt(134)
    )
    assert content["participations"] == 20
    epsilons = [outcome["epsilon_total"] for outcome in content["colluding"]]
    assert epsilons == sorted(epsilons) and epsilons[0] == content["epsilon_total"] < epsilons[-1]
    full, *_, fewest = content["dropping"]
    assert full["epsilon_total"] < fewest["epsilon_total"] == content["epsilon_total"]
    text = run("plan", *arguments.split())[1]
    assert "2.07 times louder; with --bits 18" in text
    assert "louder" not in run("plan", *arguments.replace("--bits 16", "--bits 18").split())[1]
    assert "28.3597" in text and "colluders" in text and "100,000 bytes" in text


ALL = "--population 100 --cohort 100 --min-survivors 100 --parameters 50000 --delta 1e-5"


@pytest.mark.parametrize(
    ("arguments", "key", "published", "tolerance"),
    [
        # dp-accounting 0.6.0: GaussianDpEvent(1.0), PLD, delta 1e-5.
        ("--rounds 1 --noise-multiplier 1 --bits 24", "gaussian_epsilon_total", 4.3772, 1e-4),
        # The same composed 500 times, by RDP and by PLD.
        ("--rounds 500 --noise-multiplier 1 --bits 24", "gaussian_epsilon_total_rdp", 354.86, 0.006),
        ("--rounds 500 --noise-multiplier 1 --bits 24", "gaussian_epsilon_total", 344.45, 0.006),
        # Central discrete Gaussian: zCDP of the continuous one (Canonne, Kamath, Steinke 2020, Theorem 4).
        (
            "--rounds 500 --noise-multiplier 1 --bits 24 --mode central --noise discrete_gaussian",
            "epsilon_total",
            354.86,
            0.01,
        ),
        # Skellam at a fine scale comes near it (Agarwal, Kairouz, Liu 2021, section 3).
        ("--rounds 500 --noise-multiplier 1 --bits 24", "epsilon_total", 354.86, 0.5),
        # dp-accounting's calibration: z for epsilon 354.86 is 1.
        ("--rounds 500 --epsilon 354.9 --bits 24", "noise_multiplier", 1.0, 1e-3),
    ],
)
def test_published_figures(run, arguments: str, key: str, published: float, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    assert plan(run, f"{ALL} {arguments}")[key] == pytest.approx(published, abs=tolerance)


def test_amplification_is_shown_and_never_claimed(run) -> None:  # type: ignore[no-untyped-def]
    """dp-accounting 0.6.0: Poisson q = 0.1, T = 500, z = 1, RDP 18.16."""
    content = plan(
        run, "--population 1000 --cohort 100 --rounds 500 --noise-multiplier 1 --delta 1e-5 --bits 24"
    )
    assert content["gaussian_epsilon_total_if_poisson_sampled"] == pytest.approx(18.16, abs=0.006)
    assert content["epsilon_total"] > 354


def test_the_parameters_of_tff(run) -> None:  # type: ignore[no-untyped-def]
    """TFF 0.87 `ddp_secure_aggregator` at z = 1, n = 100, 16 bits, d = 50,000, C = 0.1, beta 0."""
    content = plan(run, f"{ALL} --rounds 1 --noise-multiplier 1 --bits 16 --clip-norm 0.1")
    assert content["tff"]["scale"] == pytest.approx(78_450.76, abs=0.01)
    assert content["tff"]["scaled_l2"] == pytest.approx(8101.861, abs=1e-3)
    assert content["tff"]["local_stddev"] == pytest.approx(784.5076, abs=1e-4)
    # TFF multiplies z by the unrounded norm and allows 3.9 standard deviations where we allow 7.4.
    assert 0.5 < content["scale"] / content["tff"]["scale"] < 0.6
    assert content["local_stddev"] * 10 / content["scaled_l2"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"clip_norm": 0.0}, InvalidParameters),
        ({"clip_norm": math.nan}, InvalidParameters),
        ({"epsilon": 0.0}, InvalidParameters),
        ({"epsilon": -1.0}, InvalidParameters),
        ({"delta": 1.0}, InvalidParameters),
        ({"bits": 7}, InvalidParameters),
        ({"rounds": 0}, InvalidParameters),
        ({"dimension": 0}, InvalidParameters),
        ({"noise_multiplier": 1.0}, InvalidParameters),
        ({"epsilon": None}, InvalidParameters),
        ({"mode": PrivacyMode.NONE}, InvalidParameters),
        ({"bits": 8}, RingTooNarrow),
        ({"bits": 12, "epsilon": 0.01}, RingTooNarrow),
        ({"cohort": 1}, CohortTooSmall),
        ({"cohort": 20, "minimum_survivors": 30}, CohortTooSmall),
        ({"population": 100}, CohortTooSmall),
        ({"colluders": 150}, CohortTooSmall),
    ],
)
def test_impossible_campaigns_are_refused_by_type(changes: dict[str, Any], error: type[PrivacyError]) -> None:
    good: dict[str, Any] = {"population": 5000, "cohort": 200, "rounds": 50, "delta": 1e-6, "epsilon": 4.0}
    with pytest.raises(error):
        forecast(Intention(**{**good, **changes}))


def test_a_split_cohort_has_the_noise_of_each_sub_cohort(run: Any) -> None:
    """Four sums with the noise of one each: twice the noise in the mean (a standard deviation)."""
    arguments = "--population 20000 --cohort 8000 --rounds 10 --noise-multiplier 1 --bits 24"
    whole = plan(run, f"{arguments} --subcohort-limit 8000")
    split = plan(run, f"{arguments} --subcohort-limit 2000")
    assert (whole["subcohorts"], split["subcohorts"]) == (1, 4)
    assert split["noise_norm"] == pytest.approx(2 * whole["noise_norm"], rel=0.01)
    assert split["epsilon_total"] == pytest.approx(whole["epsilon_total"], rel=0.01)
    _, told, _ = run("plan", *arguments.split(), "--subcohort-limit", 2000)
    assert "4 of 2000 devices on average" in told


def test_a_refusal_is_a_sentence_and_exit_code_1(run) -> None:  # type: ignore[no-untyped-def]
    good = ["--population", "5000", "--cohort", "200", "--rounds", "50", "--epsilon", "4"]
    code, out, err = run("plan", *good, "--bits", "8", "--json")
    assert (code, out) == (1, "") and "bits would do" in err and "Traceback" not in err
    code, _, err = run("plan", *good, "--clip-norm", "0")
    assert code == 1 and "clip_norm" in err


def test_without_noise_nothing_is_promised(run) -> None:  # type: ignore[no-untyped-def]
    arguments = "--population 10 --cohort 10 --rounds 3 --mode none"
    content = plan(run, arguments)
    assert content["epsilon_total"] is None and content["noise_norm"] == 0
    assert "nothing is promised" in run("plan", *arguments.split())[1]


def test_a_plot_is_drawn(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    target = tmp_path / "epsilon.png"
    good = ["--population", "500", "--cohort", "50", "--rounds", "50", "--epsilon", "4", "--bits", "20"]
    assert run("plan", *good, "--plot", target)[0] == 0
    assert target.read_bytes().startswith(b"\x89PNG")


# --- the ledger ------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An aggregator after two private rounds, and one that was aborted before anything was released."""
    state = tmp_path / "state"
    covey.init(state)
    bench = Bench(state)
    private = {"privacy": PrivacyMode.DISTRIBUTED, "noise_multiplier": 2.0}
    bench.finish(bench.start(campaign_request(rounds=2, **private)))
    for name in ("device-0", "device-1", "device-2"):
        bench.devices[name].mute = {"share-keys"}
    bench.finish(bench.start(campaign_request(**private)))
    bench.close()
    return state


def test_the_ledger_is_recomputed_from_the_transcript(run, state: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("ledger", "--json")
    content = json.loads(out)
    assert (code, content["matches"], content["differences"], content["rounds"]) == (0, True, [], 3)
    assert content["population"]["releases"] == 2
    assert content["models"].keys() == {"toy"}
    assert content["models"]["toy"] == content["population"]
    with covey.open_operator(state) as operator:
        reported = [view.report.epsilon for view in operator.rounds() if view.record.version]
    assert content["population"]["epsilon"] == pytest.approx(reported[-1])
    assert "agrees with the transcript of 3 rounds" in run("ledger")[1]


def edit(state: Path, statement: str) -> None:
    connection = sqlite3.connect(state / "aggregator.db")
    assert connection.execute(statement).rowcount >= 1
    connection.commit()
    connection.close()


def test_an_edited_ledger_is_told_from_the_transcript(run, state: Path) -> None:  # type: ignore[no-untyped-def]
    with covey.open_operator(state) as operator, operator.repository.read() as reader:
        first = reader.ledger()[0]
    cheaper = first.event.replace(b'"survivors":', b'"survivors":9')
    connection = sqlite3.connect(state / "aggregator.db")
    connection.execute("UPDATE privacy_ledger SET event = ? WHERE round_id = ?", (cheaper, first.round_id))
    connection.commit()
    connection.close()
    code, out, err = run("ledger", "--json")
    assert code == 1 and "another event" in err
    assert not json.loads(out)["matches"]
    edit(state, "DELETE FROM privacy_ledger WHERE seq = (SELECT min(seq) FROM privacy_ledger)")
    code, _, err = run("ledger")
    assert code == 1 and "not in the ledger" in err


def test_a_round_left_out_of_the_transcript_breaks_it(run, state: Path) -> None:  # type: ignore[no-untyped-def]
    edit(
        state,
        "DELETE FROM transcripts WHERE round_id = (SELECT round_id FROM rounds WHERE number = 1 LIMIT 1)",
    )
    code, _, err = run("ledger")
    assert code == 1 and "transcript cannot be trusted" in err


def test_anybody_can_audit_a_transcript(state: Path, tmp_path: Path) -> None:
    """Written by the aggregator, checked without it; each way of changing it is found out."""
    file = tmp_path / "transcript.jsonl"
    runner = CliRunner()
    told = runner.invoke(cli.app, ["audit", "--state", str(state), "--out", str(file), "--json"])
    content = json.loads(told.stdout)
    assert content["rounds"] == 3
    assert content["models"] == {"toy": content["population"]}
    assert content["queries"] == {"epsilon": 0.0, "releases": 0}
    with covey.open_operator(state) as operator, operator.repository.read() as reader:
        audited = audit_ledger(reader, 1e-5).population
        assert content["population"] == {"epsilon": audited.epsilon, "releases": 2}

    def check(*arguments: str) -> Any:
        return runner.invoke(
            cli.app, ["audit", str(file), "--json", *arguments], env={"COVEY_STATE": "/nowhere"}
        )

    assert json.loads(check("--head", content["head"]).stdout) == content
    assert "another one" in str(check("--head", "00" * 32).exception)
    lines = file.read_bytes().splitlines(keepends=True)
    cheaper = [line.replace(b'"survivors":', b'"survivors":9', 1) for line in lines]
    for wrong in (lines[1:], lines[:-1], lines[:3] + lines[4:], cheaper, lines + lines[-1:], [b"{}\n"]):
        file.write_bytes(b"".join(wrong))
        assert "cannot be trusted" in str(check().exception)
    file.write_bytes(b"".join(lines)[:-1])
    assert "cut off" in str(check().exception)


def test_an_untouched_aggregator_has_spent_nothing(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    covey.init(tmp_path / "state")
    content = json.loads(run("ledger", "--json")[1])
    assert content["population"]["epsilon"] == 0 and content["models"] == {}


def test_mode_example_is_planned_for_one_example_and_never_for_the_device(run: Any) -> None:
    arguments = "--population 50 --cohort 10 --rounds 20 --mode example --sampling 0.05 --epsilon 4"
    found = plan(run, arguments)
    assert set(KEYS) <= found.keys()
    assert (
        3.95 < found["epsilon_total"] <= 4 and found["unit"] == "example" and found["epsilon_device"] is None
    )
    # The same noise, given instead of asked for.
    z = found["noise_multiplier"]
    again = plan(run, arguments.replace("--epsilon 4", f"--noise-multiplier {z}"))
    assert again["epsilon_total"] == pytest.approx(found["epsilon_total"])
    assert again["epsilon_total_if_coins_were_seen"] > 10 * again["epsilon_total"]
    code, out, _ = run("plan", *arguments.split())
    assert code == 0 and "one example of a device" in out and "the device itself is promised nothing" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--epsilon 4 --sampling 0", "sampling_probability"),
        ("--epsilon 0", "positive and finite"),
        ("--epsilon 4 --clip-norm 0", "clip_norm"),
        ("--epsilon 4 --delta 0", "delta"),
        ("--epsilon 1e-9", "no noise multiplier"),
        ("", "either an epsilon"),
        ("--epsilon 4 --colluders 2", "no plot, colluders"),
        ("--epsilon 4 --local-epochs 0", "at least one round and epoch"),
    ],
)
def test_figures_that_make_no_plan_in_mode_example(run: Any, arguments: str, told: str) -> None:
    common = "--population 50 --cohort 10 --rounds 20 --mode example"
    code, out, err = run("plan", *common.split(), *arguments.split())
    assert code == 1 and told in out + err


def test_a_noise_tree_is_planned_with_restarts(run: Any) -> None:
    """z as dp_accounting has it for twenty trees of 25 rounds, and the noise that is left in the model."""
    arguments = (
        "--population 5000 --cohort 200 --rounds 500 --epsilon 4 --delta 1e-6 --mode central --bits 24"
    )
    own, tree = plan(run, arguments), plan(run, f"{arguments} --restart-every 25")
    assert own["composition"] == "rounds" and tree["composition"] == "tree" and tree["restart_every"] == 25
    z = tree_noise_multiplier(epsilon=4.0, rounds=500, restart_every=25, delta=1e-6)
    assert tree["noise_multiplier"] == pytest.approx(z, rel=5e-3)
    assert own["tree"]["noise_multiplier"] == pytest.approx(z, rel=5e-3)
    assert 3.99 < tree["epsilon_total"] <= 4
    # In the sum of 25 updates, independent noise adds up to five times that of one.
    assert tree["noise_norm"] < 0.2 * 5 * own["noise_norm"]
    _, out, _ = run("plan", *arguments.split(), "--restart-every", 25)
    assert "restarts every 25 rounds" in out and "not claimed" not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [("--restart-every 26", "5200 devices"), ("--restart-every 5 --mode distributed", "mode central")],
)
def test_trees_that_cannot_be(run: Any, arguments: str, told: str) -> None:
    common = "--population 5000 --cohort 200 --rounds 500 --epsilon 4 --mode central"
    code, out, err = run("plan", *common.split(), *arguments.split())
    assert code == 1 and told in out + err
