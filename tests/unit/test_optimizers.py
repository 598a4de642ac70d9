"""Server optimizers against their published formulas, written out one coordinate at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregator.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    OptimizerError,
    OptimizerState,
    ServerOptimizer,
)

Step = Callable[[float, float, float, float], tuple[float, float, float]]


def fedavg(x: float, m: float, v: float, u: float) -> tuple[float, float, float]:
    return x + 0.5 * u, m, v


def fedavgm(x: float, m: float, v: float, u: float) -> tuple[float, float, float]:
    m = 0.7 * m + u
    return x + 0.3 * m, m, v


def fedadagrad(x: float, m: float, v: float, u: float) -> tuple[float, float, float]:
    v = v + u * u
    return x + 0.1 * u / (math.sqrt(v) + 1e-3), u, v


def fedadam(x: float, m: float, v: float, u: float) -> tuple[float, float, float]:
    m = 0.9 * m + 0.1 * u
    v = 0.99 * v + 0.01 * u * u
    return x + 0.1 * m / (math.sqrt(v) + 1e-3), m, v


def fedyogi(x: float, m: float, v: float, u: float) -> tuple[float, float, float]:
    m = 0.9 * m + 0.1 * u
    sign = (v > u * u) - (v < u * u)
    v = v - 0.01 * u * u * sign
    return x + 0.1 * m / (math.sqrt(v) + 1e-3), m, v


CASES: list[tuple[ServerOptimizer, Step]] = [
    (FedAvg(0.5), fedavg),
    (FedAvgM(0.3, beta=0.7), fedavgm),
    (FedAdagrad(), fedadagrad),
    (FedAdam(), fedadam),
    (FedYogi(), fedyogi),
]


@pytest.mark.parametrize(("optimizer", "step"), CASES, ids=lambda case: type(case).__name__)
def test_ten_rounds_follow_the_published_formula(optimizer: ServerOptimizer, step: Step) -> None:
    rng = np.random.default_rng(5)
    parameters = rng.standard_normal(20).astype(np.float32)
    updates = (rng.standard_normal((10, 20)) * 0.05).astype(np.float32)
    state = optimizer.init(parameters)
    expected = [(float(x), 0.0, 1e-6) for x in parameters]
    for update in updates:
        before = state.parameters.copy()
        following = optimizer.apply(state, update)
        np.testing.assert_array_equal(state.parameters, before)  # the old state is left alone
        state = following
        expected = [step(*memory, float(u)) for memory, u in zip(expected, update, strict=True)]
        np.testing.assert_allclose(state.parameters, [x for x, _, _ in expected], rtol=2e-5, atol=2e-6)
    assert state.rounds == 10
    assert state.parameters.dtype == np.float32


def test_fedavg_with_rate_one_adds_the_mean_update() -> None:
    optimizer = FedAvg()
    state = optimizer.apply(optimizer.init(np.ones(3, np.float32)), np.array([1, 2, -3], np.float32))
    np.testing.assert_array_equal(state.parameters, np.array([2, 3, -2], np.float32))


@pytest.mark.parametrize(("optimizer", "step"), CASES, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize(
    "update",
    [
        np.zeros(4, np.float32),
        np.zeros(3, np.float64),
        np.array([0, np.nan, 0], np.float32),
        np.array([0, np.inf, 0], np.float32),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    optimizer: ServerOptimizer, step: Step, update: np.ndarray
) -> None:
    with pytest.raises(OptimizerError):
        optimizer.apply(optimizer.init(np.zeros(3, np.float32)), update)


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_a_state_of_another_optimizer_is_refused(optimizer: ServerOptimizer) -> None:
    with pytest.raises(OptimizerError, match="another optimizer"):
        optimizer.apply(OptimizerState(np.zeros(3, np.float32)), np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (FedAvg, {"learning_rate": 0.0}),
        (FedAvg, {"learning_rate": math.nan}),
        (FedAvgM, {"beta": 1.0}),
        (FedAdam, {"beta1": -0.1}),
        (FedAdam, {"beta2": 1.0}),
        (FedYogi, {"beta2": 1.0}),
        (FedAdagrad, {"tau": 0.0}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(
    make: Callable[..., ServerOptimizer], changes: dict[str, Any]
) -> None:
    with pytest.raises(OptimizerError):
        make(**changes)
