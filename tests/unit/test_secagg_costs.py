"""What a round is said to cost is what it does cost."""

from __future__ import annotations

import json

import pytest

from protocol.codec import encode
from protocol.secagg import server
from protocol.secagg.costs import device_costs
from protocol.secagg.parameters import GraphAssumptions, parameters
from tests.secagg_round import Cohort


def test_control_bytes_are_those_of_a_real_round() -> None:
    cohort = Cohort(9, reboot=False)
    device = "device-003"
    up = len(encode(cohort.clients[device].answer))  # type: ignore[arg-type, union-attr]
    down = 0
    cohort.advertise()
    for step in ("share", "deliver", "check", "unmask"):
        down += len(encode(server.request(cohort.server, device)))  # type: ignore[arg-type]
        if step == "deliver":
            cohort.deliver()
            cohort.upload()
            continue
        cohort.exchange()
        up += len(encode(cohort.clients[device].answer))  # type: ignore[arg-type, union-attr]
    said = device_costs(parameters(9, GraphAssumptions()), 1000, 20)
    assert said.upload_bytes == 2500
    assert said.control_up_bytes == pytest.approx(up, rel=0.1)
    assert said.control_down_bytes == pytest.approx(down, rel=0.15)


def test_the_command_prints_what_both_sides_will_use() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from aggregator.cli import app

    result = CliRunner().invoke(app, ["secagg", "parameters", "--cohort", "1000", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert (figures["k"], figures["t"], figures["graph"]) == (96, 67, "regular")
    assert figures["upload_bytes"] == 2_500_000
    assert 0 < figures["cpu_seconds"] < 60
    refused = CliRunner().invoke(app, ["secagg", "parameters", "--cohort", "1000", "--corrupt", "0.5"])
    assert refused.exit_code == 2
    assert "--corrupt" in refused.output
