"""The plan: what a round may ask, and what is no plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.dp.parameters import AdaptiveClipping, MetricSlot, PrivacyMode, PrivacyParameters
from protocol.errors import MalformedMessage
from protocol.plan import (
    HistogramQuestion,
    MeanQuestion,
    Plan,
    QuantileQuestion,
    QueryTask,
    SumQuestion,
    Task,
)
from tests.edge_fleet import plan

PRIVACY = PrivacyParameters(
    mode=PrivacyMode.DISTRIBUTED, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, bits=32, rotation=False
)


def query(**changes: Any) -> QueryTask:
    """A query for a mean; `changes` replace its fields."""
    values: dict[str, Any] = {
        "field": "battery-temperature",
        "low": 0.0,
        "high": 80.0,
        "question": MeanQuestion(),
    }
    return QueryTask(**{**values, **changes})


@pytest.mark.parametrize(
    "task",
    [
        plan().task,
        query(),
        query(question=SumQuestion()),
        query(question=HistogramQuestion(bins=16)),
        query(question=QuantileQuestion(q=0.5, bins=64)),
    ],
)
def test_a_plan_survives_its_bytes(task: Task) -> None:
    sent = plan(task=task, privacy=PRIVACY)
    assert Plan.from_bytes(sent.to_bytes()) == sent


def test_a_query_names_its_dimension() -> None:
    assert query().dimension == query(question=SumQuestion()).dimension == 1
    assert query(question=HistogramQuestion(bins=16)).dimension == 16
    assert query(question=QuantileQuestion(q=0.9, bins=64)).dimension == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"low": 80.0, "high": 0.0},
        {"low": 1.0, "high": 1.0},
        {"low": 1e9, "high": 1e9 + 0.5},
        {"low": math.nan},
        {"high": math.nan},
        {"high": math.inf},
        {"low": -math.inf},
        {"high": 1e300},
        {"field": "Battery temperature"},
        {"field": ""},
    ],
)
def test_bounds_and_names_that_make_no_query(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        query(**changes)


@pytest.mark.parametrize("bins", [0, 1, -3, 4097, 10**9])
def test_a_histogram_has_two_to_4096_bins(bins: int) -> None:
    with pytest.raises(ValidationError):
        HistogramQuestion(bins=bins)
    with pytest.raises(ValidationError):
        QuantileQuestion(q=0.5, bins=bins)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_lies_between_0_and_1(q: float) -> None:
    with pytest.raises(ValidationError):
        QuantileQuestion(q=q, bins=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 2.0},
        {"rotation": True},
        {"metric_slots": (MetricSlot(name="examples", bound=1.0),)},
        {"adaptive": AdaptiveClipping()},
    ],
)
def test_a_query_has_nothing_beside_its_answer(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        plan(task=query(), privacy=PRIVACY.model_copy(update=changes))


def test_a_task_of_another_kind_is_no_plan() -> None:
    payload = plan(task=query(), privacy=PRIVACY).to_bytes().replace(b'"kind":"query"', b'"kind":"erase"')
    with pytest.raises(MalformedMessage):
        Plan.from_bytes(payload)
