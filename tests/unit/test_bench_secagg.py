"""The benchmark runs whole rounds and says what it claims; how fast is no matter here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich", reason="the bare device install has no tables")

from benchmarks import secagg
from benchmarks.secagg_case import Case, Outcome, run
from benchmarks.secagg_cohort import REAL_UP_TO, Stopwatch
from benchmarks.secagg_counts import counts
from benchmarks.secagg_server import CODEC, Report

KEYS = [
    *("n", "d", "dropout", "graph", "client_cpu_s", "server_cpu_s", "client_over_floor", "server_over_floor"),
    *("client_speedup_vs_flower", "server_speedup_vs_flower", "server_peak_bytes", "upload_bytes"),
    *("client_warm_cpu_s", "server_warm_cpu_s", "client_warm_over_floor", "server_warm_over_floor"),
    *("client_warm_speedup_vs_flower", "server_warm_speedup_vs_flower"),
]


def quiet(_: str, __: float) -> None:
    """No progress bar."""


@pytest.mark.parametrize(
    "case",
    [
        Case(6, 3_000, 0.2, complete=True, repeats=1, rounds=2),
        Case(REAL_UP_TO + 12, 70_000, repeats=1),
        Case(70, 9, 0.1, complete=False, repeats=1),
    ],
    ids=["real clients", "stand-ins", "regular graph"],
)
def test_a_round_gives_the_sum_and_the_figures(case: Case) -> None:
    """The round itself checks the sum against the inputs."""
    outcome = run(case, quiet, peer=False)
    row = outcome.to_json()
    assert list(row) == KEYS
    assert json.loads(json.dumps(row)) == row
    assert (row["n"], row["d"], row["dropout"]) == (case.n, case.d, case.dropout)
    assert row["client_speedup_vs_flower"] is row["server_speedup_vs_flower"] is None
    assert min(outcome.client.parts.values()) >= 0
    assert row["server_peak_bytes"] > 10**7
    # What the protocol promises of an upload: test_secagg_costs has every frame of it.
    assert row["upload_bytes"] <= 1.02 * case.d * case.bits / 8 + 200 * case.graph.degree + 1_700
    dropouts = case.n - len(case.survivors)
    assert len(case.survivors) < outcome.server.masks <= len(case.survivors) + dropouts * case.graph.degree
    assert all(value >= 0 for value in counts(case, outcome.server.masks).values())


def outcome(n: int, client_s: float, server_s: float, floor_s: float) -> Outcome:
    client, server = (
        Stopwatch(1, {"mask": client_s, CODEC: 9.0}),
        Report({"remove masks": server_s, CODEC: 9.0}),
    )
    return Outcome(
        Case(n, 10**5), client, server, 0.0, client_s / 2, floor_s, 1, flower_client_s=10 * client_s
    )


def test_growth_is_told_as_an_exponent_and_against_log_n() -> None:
    lines = secagg.growth_lines([outcome(100, 1.0, 1.0, 1.0), outcome(10_000, 2.0, 200.0, 100.0)])
    assert lines[-1].endswith("server n^1.15 (its floor n^1.00), client 1.00 times what log n gives")


def test_ratios_leave_the_codec_out_and_absent_figures_are_null() -> None:
    row = outcome(100, 1.0, 3.0, 2.0).to_json()
    assert (row["client_cpu_s"], row["server_cpu_s"]) == (1.0, 3.0)
    assert (row["client_over_floor"], row["server_over_floor"]) == (2.0, 1.5)
    assert (row["client_speedup_vs_flower"], row["server_speedup_vs_flower"]) == (10.0, None)


def test_what_a_round_of_known_devices_takes_is_told_apart() -> None:
    found = outcome(100, 1.0, 3.0, 2.0)
    row = replace(found, warm_saving_s=0.5, server=replace(found.server, warm_saving_s=1.0)).to_json()
    assert (row["client_cpu_s"], row["client_warm_cpu_s"]) == (1.0, 0.5)
    assert (row["server_cpu_s"], row["server_warm_cpu_s"], row["server_warm_over_floor"]) == (3.0, 2.0, 1.0)
    assert (row["client_speedup_vs_flower"], row["client_warm_speedup_vs_flower"]) == (10.0, 20.0)


def test_the_fastest_of_two_runs_is_taken_part_by_part() -> None:
    one, other = Report({"a": 1.0, "b": 4.0}, 10, 7, 0.2, None), Report({"a": 2.0, "b": 3.0}, 20, 7, 0.1, 0.5)
    both = one.fastest(other)
    assert both.warm_saving_s == 0.1
    assert (both.parts, both.peak_bytes, both.parallel_wall_s) == ({"a": 1.0, "b": 3.0}, 20, 0.5)


def test_every_case_of_the_issue_is_there() -> None:
    cases = {(case.n, case.d, case.graph.complete) for case in secagg.chosen(secagg.parse([]))}
    assert cases >= {
        (10, 10**6, True),
        (10, 11_700_000, True),
        (100, 10**5, True),
        (1000, 10**6, False),
        (10_000, 10**5, False),
    }
    assert all(case.dropout == 0.1 for case in (*secagg.CASES, *secagg.GROWTH))


def test_one_case_goes_to_the_file_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "secagg.json"
    assert secagg.main(["--n", "5", "--d", "1e3", "--dropout", "0.2", "--no-peer", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert list(row) == KEYS
    assert np.isfinite(row["server_over_floor"])


@pytest.mark.parametrize(
    "wrong", ["--n 5", "--d 5", "--n 2 --d 5", "--n 5 --d 0", "--n 5 --d 5 --dropout 0.5"]
)
def test_a_case_that_cannot_be_is_refused(wrong: str) -> None:
    with pytest.raises(SystemExit):
        secagg.parse(wrong.split())
