"""Mode example: the divergence of sampled integer noise, and the mechanism of one step."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2, skellam

from protocol.dp.accounting import spend
from protocol.dp.divergence import ORDERS, renyi_curve, sampled_curve, skellam_divergence
from protocol.dp.errors import InvalidParameters
from protocol.dp.events import event_for
from protocol.dp.example import (
    ExampleMechanism,
    example_event,
    example_mechanism,
    noisy_gradient,
    quantised,
    sampled,
    step_keys,
)
from protocol.dp.mechanism import derive_encoding
from protocol.dp.parameters import (
    ExamplePrivacy,
    MetricSlot,
    NoiseDistribution,
    PrivacyMode,
    PrivacyParameters,
)


def plan(z: float = 1.0, q: float = 0.1, clip: float = 1.0, **changes: Any) -> PrivacyParameters:
    figures: dict[str, Any] = {
        "mode": PrivacyMode.EXAMPLE,
        "clip_norm": 1.0,
        "noise_multiplier": 0.0,
        "delta": 1e-5,
        "bits": 16,
        "example": ExamplePrivacy(clip_norm=clip, noise_multiplier=z, sampling_probability=q),
    }
    return PrivacyParameters(**figures | changes)


def mechanism(z: float = 1.0, q: float = 0.1, dimension: int = 20, clip: float = 1.0) -> ExampleMechanism:
    return example_mechanism(plan(z, q, clip), dimension)


@pytest.mark.parametrize(("variance", "shift", "q"), [(4.0, 1, 0.1), (4.0, 2, 0.5), (30.0, 4, 0.02)])
def test_the_sampled_bound_holds_in_both_directions(variance: float, shift: int, q: float) -> None:
    k = np.arange(-400, 401)
    base = skellam.logpmf(k, variance / 2, variance / 2)
    moved = skellam.logpmf(k - shift, variance / 2, variance / 2)
    known = np.isfinite(base) & np.isfinite(moved)
    base, moved = base[known], moved[known]
    mixed = np.logaddexp(math.log1p(-q) + base, math.log(q) + moved)
    bound = sampled_curve(q, lambda order: skellam_divergence(order, shift, shift**2, 1, variance))
    for order, most in zip(ORDERS, bound, strict=True):
        if order > 32:
            continue  # beyond, what the sums leave out weighs more than the rest
        there = math.log(np.exp(order * mixed - (order - 1) * base).sum()) / (order - 1)
        back = math.log(np.exp(order * base - (order - 1) * mixed).sum()) / (order - 1)
        assert back <= there * (1 + 1e-9) + 1e-12
        assert there <= most * (1 + 1e-9) + 1e-12


def test_the_curve_is_the_sampled_gaussians_at_integer_orders() -> None:
    """dp_accounting's RDP of the Poisson-sampled Gaussian; a fine grid differs by its curvature alone."""
    ours = dict(zip(ORDERS, renyi_curve(example_event(mechanism(z=1.0, q=0.01), 1)), strict=True))
    orders = [2, 3, 8, 20, 40]
    accountant = rdp.RdpAccountant(orders)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0)))
    for order, library in zip(orders, accountant._rdp, strict=True):
        assert ours[order] == pytest.approx(library, rel=1e-4)


def test_epsilon_of_a_training() -> None:
    # dp_accounting 0.6.0: 18.16 by RDP with fractional orders, which the chord makes 3 % dearer; 354.86.
    def epsilon(q: float, steps: int) -> float:
        return spend({example_event(mechanism(q=q), steps): 1}, 1e-5).epsilon

    assert 18.16 <= epsilon(0.1, 500) <= 1.03 * 18.16
    assert epsilon(1.0, 500) == pytest.approx(354.86, rel=1e-3)
    assert epsilon(0.1, 250) + epsilon(0.1, 250) > epsilon(0.1, 500) > epsilon(0.1, 250)


def test_two_units_never_add_up() -> None:
    central = PrivacyParameters(
        mode=PrivacyMode.CENTRAL, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, bits=16
    )
    encoding = derive_encoding(
        central, dimension=20, minimum_survivors=4, maximum_clients=5, rotation_seed=bytes(32)
    )
    example = example_event(mechanism(), 10)
    assert spend({example: 1}, 1e-5).unit == "example"
    with pytest.raises(InvalidParameters, match="do not add up"):
        spend({example: 1, event_for(encoding, 4): 1}, 1e-5)


def test_the_sum_of_the_devices_hides_no_device() -> None:
    encoding = derive_encoding(
        plan(), dimension=20, minimum_survivors=4, maximum_clients=5, rotation_seed=bytes(32)
    )
    event = event_for(encoding, 4)
    assert encoding.local_variance == encoding.central_variance == 0
    assert (event.unit, event.mode, event.mechanism) == ("device", PrivacyMode.EXAMPLE, "none")
    assert spend({event: 1}, 1e-5).epsilon == math.inf


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"example": None}, "belong together"),
        ({"mode": PrivacyMode.NONE}, "belong together"),
        ({"noise_multiplier": 1.0}, "adds no noise to the sum"),
        ({"metric_slots": (MetricSlot(name="accuracy", bound=1.0),)}, "would tell of the examples"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        plan(**changes)


@pytest.mark.parametrize(
    "figures", [(0.0, 0.1, 1.0), (math.nan, 0.1, 1.0), (1.0, 0.0, 1.0), (1.0, 1.1, 1.0), (1.0, 0.1, 0.0)]
)
def test_figures_out_of_range_are_refused(figures: tuple[float, float, float]) -> None:
    with pytest.raises(ValidationError):
        plan(*figures)


def test_other_plans_hide_no_examples() -> None:
    with pytest.raises(InvalidParameters, match="does not hide examples"):
        example_mechanism(plan(mode=PrivacyMode.NONE, example=None), 20)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([0.01, 1.0, 64.0]),
)
@settings(max_examples=300, deadline=None)
def test_no_gradient_is_longer_than_the_sensitivity(values: list[float], clip: float, z: float) -> None:
    gradient = np.array(values, np.float32)
    step = mechanism(z=z, dimension=len(values), clip=clip)
    integers = quantised(step, gradient)
    assert (
        sum(int(value) ** 2 for value in integers)
        <= step.radius**2
        == example_event(step, 1).sensitivity_squared
    )
    back = integers / step.scale
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    expected = gradient.astype(np.float64) * min(1.0, clip / norm if norm else 1.0)
    assert np.abs(back - expected).max() <= 1.001 / step.scale + 1e-9 * clip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad: float) -> None:
    gradient = np.ones(20, np.float32)
    gradient[3] = bad
    assert not quantised(mechanism(), gradient).any()


def test_coins_are_independent_and_fair_to_q() -> None:
    """Chi-squared of 200 steps, and of two steps together; false alarm below 10^-6 each."""
    step, secret, count = mechanism(q=0.2), bytes(range(32)), 1000
    chosen = np.zeros((200, count), bool)
    for number in range(200):
        chosen[number, sampled(step, count, step_keys(secret, number)[0])] = True
    sizes = chosen.sum(axis=1)
    assert ((sizes - 200) ** 2 / 160).sum() < chi2.isf(1e-6, 200)
    both = int((chosen[::2] & chosen[1::2]).sum())
    assert abs(both - 100 * count * 0.04) < 5 * math.sqrt(100 * count * 0.04 * 0.96)
    assert len(sampled(mechanism(q=1.0), count, step_keys(secret, 0)[0])) == count


@pytest.mark.parametrize("noise", NoiseDistribution)
def test_the_noise_has_the_variance_that_is_accounted_for(noise: NoiseDistribution) -> None:
    """Sum of squares over 20,000 draws; false alarm below 10^-6."""
    dimension, count = 20_000, 50
    step = example_mechanism(plan(z=2.0, q=0.2, clip=3.0, noise=noise), dimension)
    total = np.zeros(dimension, np.int64)
    estimate = noisy_gradient(step, total, count, step_keys(bytes(32), 0)[1], step.sampler())
    # z C over the expected batch.
    unit = estimate.astype(np.float64) / (2.0 * 3.0 / (0.2 * count))
    assert chi2.isf(1 - 5e-7, dimension) < (unit**2).sum() < chi2.isf(5e-7, dimension)
    shifted = noisy_gradient(step, total + step.radius, count, step_keys(bytes(32), 0)[1], step.sampler())
    np.testing.assert_allclose(shifted - estimate, 3.0 / (0.2 * count), rtol=1e-4)


def test_every_step_has_keys_of_its_own() -> None:
    keys = [key for step in range(50) for key in step_keys(bytes(32), step)]
    assert len(set(keys)) == 100


def test_steps_follow_the_epochs() -> None:
    assert plan(q=0.1).example.steps(3) == 30  # type: ignore[union-attr]
    assert plan(q=1.0).example.steps(3) == 3  # type: ignore[union-attr]
