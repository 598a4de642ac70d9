"""The kill matrix: SIGKILL at the boundaries of rounds, buffers and rollouts, and nothing is lost.

`benchmarks/faults.py` crosses all of them, of buffers and of the database's death as well.
"""

from __future__ import annotations

import itertools

import pytest

from benchmarks.faults import VICTIMS, run_case, run_matrix
from benchmarks.faults_rollouts import run_rollout_case
from benchmarks.faults_service import BOUNDARIES, BUFFER_BOUNDARIES, ROLLOUT_BOUNDARIES, SIDES
from deploy.broker import find_mosquitto
from tests.databases import find_postgresql

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]
OF_BUFFERS = tuple(each for each in BUFFER_BOUNDARIES if each not in BOUNDARIES)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("victim", ["aggregator", "broker"])
def test_nothing_is_lost(victim: str, boundary: str, side: str) -> None:
    outcome = run_case(boundary, side, victim, None)
    assert outcome.lossless, outcome


# A sample: a buffer is collected as a round is, of which only the end is here, and each case takes seconds.
@pytest.mark.parametrize(
    ("boundary", "side"), [*((boundary, SIDES[1]) for boundary in OF_BUFFERS), ("end", SIDES[0])]
)
def test_a_buffer_loses_nothing(boundary: str, side: str) -> None:
    outcome = run_case(boundary, side, "aggregator", None, buffered=True)
    assert outcome.lossless, outcome


@pytest.mark.parametrize(
    ("boundary", "side"), list(zip(ROLLOUT_BOUNDARIES, itertools.cycle(SIDES), strict=False))
)
def test_a_rollout_takes_every_step_once(boundary: str, side: str) -> None:
    outcome = run_rollout_case(boundary, side)
    assert outcome.lossless, outcome


@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_postgresql() is None, reason="PostgreSQL is not installed")
def test_nothing_is_lost_when_the_database_dies() -> None:
    outcomes = list(run_matrix([VICTIMS[2]]))
    assert len(outcomes) == len(BOUNDARIES) * len(SIDES)
    assert [outcome for outcome in outcomes if not outcome.lossless] == []
