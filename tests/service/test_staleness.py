"""How old the updates of a buffered campaign are: where an operator sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jinja2")
pytest.importorskip("selenium")

from aggregator import cli_output
from aggregator.access.roles import Role
from aggregator.rounds.report import BufferReport, RoundReport
from aggregator.telemetry.metrics import ServiceMetrics
from aggregator.web.console.figures import progress
from tests.api_bench import Api, api
from tests.console_bench import seed_buffers, seed_fleet, seed_rounds
from tests.console_pages import page, sign_in


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        seed_fleet(found.context.operator, 20)
        seed_rounds(found.context.operator, 2)
        seed_buffers(found.context.operator)
        yield found


def test_a_report_counts_what_is_in_the_sum_by_age() -> None:
    buffer = BufferReport(staleness={"a": 3, "b": 0, "c": 3, "lost": 9}, too_old=("d",))
    report = RoundReport(buffer=buffer, survivors=("a", "b", "c"))
    assert report.ages() == {0: 1, 3: 2} and list(report.ages()) == [0, 3]
    assert RoundReport.from_bytes(report.to_bytes()) == report
    assert RoundReport(survivors=("a",)).ages() == {}
    assert RoundReport.from_bytes(b"{}").buffer is None, "of a round before buffers were reported"


def test_prometheus_counts_updates_by_age_and_those_that_were_dropped(bench: Api) -> None:
    metrics = ServiceMetrics(bench.context.operator.repository)
    for view in bench.context.operator.rounds():
        record = view.record
        metrics.publish("round", {"round": record.round_id, "status": record.status})
    text = metrics.text().decode()

    def value(name: str) -> float:
        (found,) = re.findall(rf"^{re.escape(name)} ([0-9.e+]+)$", text, re.M)
        return float(found)

    # Five buffers of five: one fresh, three of one version behind, one that lags by 2, 3, 4, 5, 6.
    assert value('covey_update_staleness_count{model="field"}') == 25
    assert value('covey_update_staleness_sum{model="field"}') == 5 * 3 + 2 + 3 + 4 + 5 + 6
    assert value('covey_update_staleness_bucket{le="0.0",model="field"}') == 5
    assert value('covey_update_staleness_bucket{le="1.0",model="field"}') == 20
    assert value('covey_updates_too_old_total{model="field"}') == 1
    assert 'covey_update_staleness_count{model="watch"}' not in text, "rounds wait for everybody"


def test_the_console_shows_them_by_round_and_over_the_versions(bench: Api) -> None:
    browser = sign_in(bench, Role.VIEWER)
    views = [view for view in bench.context.operator.rounds() if view.record.model == "field"]
    text = page(bench, f"/rounds/{views[2].record.round_id}", browser)
    rows = re.findall(
        r'<tr><th>(\d+)</th>.*?value="(\d+)".*?<td class="number">(\d+)</td><td class="number">([\d.]+)<',
        text,
    )
    assert rows == [("0", "1", "1", "1"), ("1", "3", "3", "0.7071"), ("4", "1", "1", "0.4472")]
    assert "Dropped before, for being too far behind" in text and 'href="/fleet/barn-00005"' in text
    assert "at most 4 versions behind" in text
    plain = bench.context.operator.rounds()[0]
    assert "versions behind" not in page(bench, f"/rounds/{plain.record.round_id}", browser)
    shown = page(bench, "/rounds", browser)
    assert [f"up to {n} behind" in shown for n in (2, 3, 4, 5, 6, 7)] == [True] * 5 + [False]
    assert "field: versions behind" in shown and "watch: versions behind" not in shown
    shown = page(bench, "/campaigns", browser)
    assert shown.count(">buffered<") == 1 and "of 6, at most 8 behind" in shown

    (curve,) = [each for each in progress(views) if each.metric == "versions behind"]
    series = {each.name: each.points for each in curve.series}
    assert series["largest"] == ((2.0, 2.0), (3.0, 3.0), (4.0, 4.0), (5.0, 5.0), (6.0, 6.0))
    assert series["mean"][0] == (2.0, 1.0) and series["mean"][-1] == (6.0, pytest.approx(1.8))


def test_the_command_line_says_how_far_behind(bench: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_output._console, "_width", 200)
    with bench.client(Role.VIEWER) as client:
        rounds = client.rounds()
    with cli_output._console.capture() as captured:
        cli_output._console.print(cli_output.rounds_table(rounds))
    lines = [line for line in captured.get().splitlines() if line.strip().startswith("field 5 ")]
    assert len(lines) == 1 and "version 6, 1.8 behind, at most 6" in lines[0], captured.get()
