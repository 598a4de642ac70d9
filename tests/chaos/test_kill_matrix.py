"""The kill matrix: SIGKILL of every part at every boundary of a round, and nothing is lost."""

from __future__ import annotations

import pytest

from benchmarks.faults import VICTIMS, run_case, run_matrix
from benchmarks.faults_service import BOUNDARIES, SIDES
from deploy.broker import find_mosquitto
from tests.databases import find_postgresql

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("victim", ["aggregator", "broker"])
def test_nothing_is_lost(victim: str, boundary: str, side: str) -> None:
    outcome = run_case(boundary, side, victim, None)
    assert outcome.lossless, outcome


@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_postgresql() is None, reason="PostgreSQL is not installed")
def test_nothing_is_lost_when_the_database_dies() -> None:
    outcomes = list(run_matrix([VICTIMS[2]]))
    assert len(outcomes) == len(BOUNDARIES) * len(SIDES)
    assert [outcome for outcome in outcomes if not outcome.lossless] == []
