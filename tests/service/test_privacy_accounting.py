"""Divergence curves against a high-precision oracle, the accountant, the budget gate and the noise solver."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from typing import Any

import pytest

mpmath = pytest.importorskip("mpmath")
pytest.importorskip("dp_accounting")

from aggregator.privacy import (  # noqa: E402
    Budget,
    BudgetExceeded,
    NoiseUnsolvable,
    account,
    check_budget,
    gaussian_reference,
    solve_noise_multiplier,
)
from protocol.dp.accounting import spend  # noqa: E402
from protocol.dp.divergence import (  # noqa: E402
    discrete_gaussian_sum_divergence,
    renyi_divergence,
    skellam_curvature,
    skellam_divergence,
)
from protocol.dp.errors import InvalidParameters, RingTooNarrow  # noqa: E402
from protocol.dp.events import DPEvent, Mechanism, event_for  # noqa: E402
from protocol.dp.parameters import NoiseDistribution, PrivacyMode, PrivacyParameters  # noqa: E402
from protocol.dp.scaling import EncodingParameters, derive_encoding  # noqa: E402

ORDERS = [1.05, 1.3, 1.5, 2, 2.5, 3, 5, 10.7, 32]


def privacy(**changes: Any) -> PrivacyParameters:
    fields: dict[str, Any] = {
        "mode": PrivacyMode.DISTRIBUTED,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "bits": 20,
    }
    return PrivacyParameters(**{**fields, **changes})


def encoding(parameters: PrivacyParameters, survivors: int = 10, dimension: int = 1000) -> EncodingParameters:
    return derive_encoding(
        parameters,
        dimension=dimension,
        minimum_survivors=survivors,
        maximum_clients=2 * survivors,
        rotation_seed=bytes(32),
    )


def divergence(probability: dict[int, Any], shift: int, order: float) -> Any:
    """Renyi divergence between a distribution on the integers and itself shifted, by direct summation."""
    alpha = mpmath.mpf(order)
    terms = (
        probability[k - shift] ** alpha * probability[k] ** (1 - alpha)
        for k in probability
        if k - shift in probability
    )
    return mpmath.log(mpmath.fsum(terms)) / (alpha - 1)


@functools.cache
def skellam(variance: float) -> dict[int, Any]:
    reach = int(40 * math.sqrt(variance)) + 120
    half = [mpmath.exp(-mpmath.mpf(variance)) * mpmath.besseli(k, variance) for k in range(reach)]
    return {k: half[abs(k)] for k in range(-reach + 1, reach)}


@functools.cache
def discrete_gaussian_sum(sigma_squared: float, shares: int) -> dict[int, Any]:
    reach = int(40 * math.sqrt(sigma_squared))
    single = {k: mpmath.exp(-k * k / (2 * mpmath.mpf(sigma_squared))) for k in range(-reach, reach + 1)}
    total = {0: mpmath.mpf(1)}
    for _ in range(shares):
        summed: dict[int, Any] = {}
        for k, p in total.items():
            for j, q in single.items():
                summed[k + j] = summed.get(k + j, mpmath.mpf(0)) + p * q
        total = summed
    mass = mpmath.fsum(total.values())
    return {k: p / mass for k, p in total.items()}


@pytest.mark.parametrize("variance", [0.1, 0.5, 1, 3, 10, 50, 300])
def test_skellam_bounds_are_above_the_exact_divergence_and_near_it(variance: float) -> None:
    with mpmath.workdps(40):
        table = skellam(variance)
        for order in ORDERS:
            for shift in (1, 2, 3, 7, 20):
                if order * shift > max(table) / 3:
                    continue  # the oracle's table is too short
                exact = divergence(table, shift, order)
                bound = skellam_divergence(order, shift, shift**2, 1, variance)
                assert bound >= exact * (1 - 1e-12)
                if variance >= 50 and order in (2, 3, 5) and shift <= 3:
                    assert bound <= exact * 1.06


@pytest.mark.parametrize("variance", [0.05, 0.5, 2, 10, 100, 400])
def test_the_curvature_bound_holds_at_every_integer(variance: float) -> None:
    with mpmath.workdps(40):
        table = skellam(variance)
        steps = [mpmath.log(table[k]) for k in range(max(table))]
        curvatures = [2 * steps[k] - steps[abs(k - 1)] - steps[k + 1] for k in range(len(steps) - 1)]
        assert max(curvatures) <= skellam_curvature(variance)
        assert skellam_curvature(variance) <= max(curvatures) * 1.25
    assert skellam_curvature(1e7) == pytest.approx(1e-7, rel=1e-5)


def test_noise_that_is_none_has_no_curvature_bound() -> None:
    """The root lies beyond what is searched: the answer must not be the end of the search."""
    assert math.isfinite(skellam_curvature(1e-200))
    assert skellam_curvature(1e-220) == math.inf
    assert skellam_divergence(1.5, 1, 1, 1, 1e-220) == math.inf


@pytest.mark.parametrize("variance", [0.1, 0.7, 5, 50])
def test_skellam_bounds_hold_for_vectors_at_any_real_order(variance: float) -> None:
    """Coordinates are independent, so that the exact divergences add; the bound sees norms only."""
    orders = [1.001, 1.03, 1.2, 1.5001, 1.77, 2, 2.25, 2.9, 3.3333, 4.5, 7.7, 10.5]
    shifts = [(3, 1, 2), (1,) * 12, (4, 0, 0, 1), (2, 2), (1, 0, 3, 1, 1, 1, 2), (4, 4, 4)]
    with mpmath.workdps(40):
        for order in orders:
            one = {shift: divergence(skellam(variance), shift, order) for shift in range(1, 5)}
            for vector in shifts:
                exact = sum(one[shift] for shift in vector if shift)
                l2_squared, nonzeros = sum(shift**2 for shift in vector), sum(shift > 0 for shift in vector)
                bound = skellam_divergence(order, sum(vector), l2_squared, nonzeros, variance)
                assert bound >= exact
                if variance == 50 and order > 2 and nonzeros < 4:
                    assert bound <= exact * 1.15  # a bound of infinity would pass the rest


def test_skellam_bounds_hold_for_the_joint_distribution() -> None:
    """The same in two dimensions by one sum over the plane, which does not presume that divergences add."""
    table = skellam(1.5)
    near = range(-30, 31)
    with mpmath.workdps(30):
        for order, (i, j) in [(1.3, (2, -1)), (2.5, (1, 1)), (2.5, (1, -2))]:
            alpha = mpmath.mpf(order)
            terms = (
                (table[x - i] * table[y - j]) ** alpha * (table[x] * table[y]) ** (1 - alpha)
                for x in near
                for y in near
            )
            exact = mpmath.log(mpmath.fsum(terms)) / (alpha - 1)
            added = divergence(table, abs(i), order) + divergence(table, abs(j), order)
            assert exact == pytest.approx(float(added), rel=1e-9)
            assert skellam_divergence(order, abs(i) + abs(j), i * i + j * j, 2, 1.5) >= exact


@pytest.mark.parametrize(("sigma_squared", "shares"), [(0.25, 2), (0.3, 3), (0.5, 2), (1.0, 3), (4.0, 2)])
def test_sums_of_discrete_gaussians_stay_under_their_bound(sigma_squared: float, shares: int) -> None:
    with mpmath.workdps(60):
        table = discrete_gaussian_sum(sigma_squared, shares)
        for order in (1.5, 2, 3, 5):
            for shift in (1, 2):
                exact = divergence(table, shift, order)
                bound = discrete_gaussian_sum_divergence(order, shift, shift**2, sigma_squared, shares, 1)
                assert bound >= exact * (1 - 1e-9)
                if sigma_squared >= 1:
                    assert bound <= exact * 1.01


def test_narrow_discrete_gaussians_count_one_share_only() -> None:
    """Below sigma = 1/2 the theorem on sums is silent; the other shares are post-processing of one."""
    for shares in (1, 2, 100):
        assert discrete_gaussian_sum_divergence(2, 1, 1, 0.2, shares, 1) == pytest.approx(2 / 0.4)


def test_more_discrete_gaussian_shares_never_cost_more() -> None:
    bounds = [discrete_gaussian_sum_divergence(2, 100, 100, 0.4, shares, 133) for shares in range(1, 60)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("noise", list(NoiseDistribution))
@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (2.0, 100), (1.0, 500), (5.0, 20)])
def test_fine_integer_noise_costs_what_the_continuous_gaussian_does(
    noise: NoiseDistribution, z: float, rounds: int
) -> None:
    params = encoding(privacy(noise_multiplier=z, noise=noise))
    spent = account([event_for(params, 10)] * rounds, 1e-5)
    reference = gaussian_reference(z, rounds=rounds, delta=1e-5, method="rdp")
    assert spent.epsilon == pytest.approx(reference, rel=2e-3)
    assert spent.rounds == rounds
    assert spent.unit == "device"


def test_coarse_rings_cost_more_noise_and_not_more_epsilon() -> None:
    """The sensitivity includes the rounding: at 12 bits the noise is larger, epsilon stays near z's."""
    params = encoding(privacy(bits=12), survivors=100, dimension=50_000)
    assert params.norm_bound_squared > 1.5 * params.radius**2
    assert account([event_for(params, 100)], 1e-5).epsilon == pytest.approx(4.7285, rel=2e-2)


def test_more_survivors_cost_less_and_colluders_cost_more() -> None:
    params = encoding(privacy())
    least = account([event_for(params, 10)], 1e-5).epsilon
    more = account([event_for(params, 20)], 1e-5).epsilon
    assert more == pytest.approx(
        gaussian_reference(math.sqrt(2), rounds=1, delta=1e-5, method="rdp"), rel=2e-3
    )
    betrayed = event_for(params, 20).model_copy(update={"colluders": 10})
    assert account([betrayed], 1e-5).epsilon == pytest.approx(least)
    sized_for_colluders = encoding(privacy(colluders=4))
    assert 6 * sized_for_colluders.local_variance == pytest.approx(sized_for_colluders.norm_bound_squared)
    assert account([event_for(sized_for_colluders, 10)], 1e-5).epsilon == pytest.approx(least, rel=1e-3)


def test_central_noise_does_not_depend_on_survivors_or_colluders() -> None:
    params = encoding(privacy(mode=PrivacyMode.CENTRAL, colluders=3))
    costs = [account([event_for(params, n)], 1e-5).epsilon for n in (10, 20)]
    assert costs[0] == costs[1] == pytest.approx(4.7285, rel=1e-3)


def test_local_noise_suffices_alone() -> None:
    """Neither more survivors nor colluders change what one device's own noise is worth."""
    params = encoding(privacy(mode=PrivacyMode.LOCAL, colluders=3))
    assert params.local_variance == params.norm_bound_squared  # z = 1, in every vector
    costs = [account([event_for(params, n)], 1e-5).epsilon for n in (10, 20)]
    assert costs[0] == costs[1] == pytest.approx(4.7285, rel=1e-3)


def test_a_round_without_noise_costs_infinity() -> None:
    params = encoding(privacy(mode=PrivacyMode.NONE, noise_multiplier=0.0))
    assert account([event_for(params, 10)], 1e-5).epsilon == math.inf
    assert renyi_divergence(event_for(params, 10), 2.0) == math.inf


def test_nothing_costs_nothing() -> None:
    assert account([], 1e-5).epsilon == 0


def test_the_order_of_events_does_not_matter() -> None:
    first = event_for(encoding(privacy()), 10)
    second = event_for(encoding(privacy(noise_multiplier=3.0, noise=NoiseDistribution.DISCRETE_GAUSSIAN)), 12)
    assert account([first, second, first], 1e-5) == account([second, first, first], 1e-5)


def test_the_distance_of_the_noise_tables_is_part_of_delta() -> None:
    event = event_for(encoding(privacy(noise_multiplier=4.0)), 10)
    exact = account([event.model_copy(update={"sampler_distance": 0.0})], 1e-5)
    real = account([event], 1e-5)
    assert exact.sampler_distance == 0
    assert real.sampler_distance == pytest.approx(10 * 1000 * event.sampler_distance)
    assert real.sampler_included
    assert exact.epsilon <= real.epsilon <= exact.epsilon * (1 + 1e-9)
    coarse = account([event.model_copy(update={"sampler_distance": 1e-12})], 1e-5)
    assert coarse.sampler_included
    assert coarse.epsilon > exact.epsilon * 1.0001
    hopeless = account([event.model_copy(update={"sampler_distance": 1e-9})], 1e-5)
    assert not hopeless.sampler_included


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(InvalidParameters):
        account([], delta)
    with pytest.raises(InvalidParameters):
        Budget(1.0, delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_without_a_positive_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(InvalidParameters):
        Budget(epsilon, 1e-5)


def test_the_budget_gate_lets_rounds_pass_until_the_next_would_exceed() -> None:
    params = encoding(privacy(noise_multiplier=4.0))
    budget = Budget(3.0, 1e-5)
    events: list[DPEvent] = []
    with pytest.raises(BudgetExceeded) as refusal:
        while len(events) < 100:
            projected = check_budget(events, params, budget)
            events.append(event_for(params, 12))
            assert account(events, 1e-5).epsilon <= projected.epsilon <= 3.0
    assert 2 < len(events) < 100
    assert refusal.value.projected.epsilon > 3.0
    assert refusal.value.budget == budget
    message = str(refusal.value)
    assert "budget gate" in message
    assert f"{refusal.value.projected.epsilon:.4g}" in message
    assert "limit is 3" in message
    assert account(events, 1e-5).epsilon <= 3.0


def test_the_budget_gate_refuses_a_round_without_noise() -> None:
    params = encoding(privacy(mode=PrivacyMode.NONE, noise_multiplier=0.0))
    with pytest.raises(BudgetExceeded, match="inf"):
        check_budget([], params, Budget(1000.0, 1e-5))


@pytest.mark.parametrize("mode", [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL])
@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 1), (4.0, 50), (30.0, 100), (354.9, 500)])
def test_the_solved_noise_is_the_least_that_meets_the_budget(
    mode: PrivacyMode, epsilon: float, rounds: int
) -> None:
    figures = {"dimension": 1000, "minimum_survivors": 10, "maximum_clients": 20}
    budget = Budget(epsilon, 1e-5)
    solved = solve_noise_multiplier(privacy(mode=mode, bits=24), budget, rounds=rounds, **figures)

    def cost(z: float) -> float:
        params = encoding(solved.model_copy(update={"noise_multiplier": z}))
        return account([event_for(params, 10)] * rounds, 1e-5).epsilon

    assert cost(solved.noise_multiplier) <= epsilon < cost(solved.noise_multiplier - 1e-4)
    if epsilon == 354.9:
        assert solved.noise_multiplier == pytest.approx(1.0, abs=1e-3)


def test_budgets_that_cannot_be_met_are_refused() -> None:
    figures = {"dimension": 1000, "minimum_survivors": 10, "maximum_clients": 20}
    silent = privacy(mode=PrivacyMode.NONE, noise_multiplier=0.0)
    with pytest.raises(NoiseUnsolvable, match="mode none"):
        solve_noise_multiplier(silent, Budget(1.0, 1e-5), rounds=1, **figures)
    with pytest.raises(NoiseUnsolvable):
        solve_noise_multiplier(privacy(), Budget(1.0, 1e-5), rounds=0, **figures)
    with pytest.raises(RingTooNarrow):
        solve_noise_multiplier(privacy(bits=10), Budget(0.01, 1e-5), rounds=10, **figures)


def test_an_unknown_mechanism_is_never_cheap() -> None:
    event = event_for(encoding(privacy()), 10)
    assert event.mechanism is Mechanism.SKELLAM
    none = event_for(encoding(privacy(mode=PrivacyMode.NONE, noise_multiplier=0.0)), 10)
    assert account([event] * 3 + [none], 1e-5).epsilon == math.inf


@pytest.mark.parametrize("noise", list(NoiseDistribution))
@pytest.mark.parametrize("mode", [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL])
@pytest.mark.parametrize(("z", "rounds"), [(0.3, 1), (1.0, 10), (8.0, 500), (300.0, 2)])
def test_the_device_reckons_what_the_library_does(
    noise: NoiseDistribution, mode: PrivacyMode, z: float, rounds: int
) -> None:
    """The device's accountant has no library; over every regime of epsilon both give the same figure."""
    event = event_for(encoding(privacy(noise_multiplier=z, noise=noise, mode=mode, bits=28)), 10)
    for delta in (1e-8, 1e-5, 0.1):
        ours, library = spend({event: rounds}, delta), account([event] * rounds, delta)
        assert ours.epsilon == pytest.approx(library.epsilon, rel=1e-9)
        assert ours.sampler_included == library.sampler_included
        assert (ours.rounds, ours.delta) == (library.rounds, library.delta)


def test_the_device_reckons_without_the_library() -> None:
    code = (
        "import sys; import protocol.dp.accounting;"
        "sys.exit(any(name.split('.')[0] in ('scipy', 'dp_accounting') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
