"""Figures that others published or that dp-accounting 0.6.0 gives: ours must reproduce them."""

from __future__ import annotations

import math

import pytest

dp_accounting = pytest.importorskip("dp_accounting")

from dp_accounting import rdp  # noqa: E402
from dp_accounting.pld import privacy_loss_distribution  # noqa: E402

from aggregator.privacy import Budget, account, gaussian_reference, solve_noise_multiplier  # noqa: E402
from aggregator.privacy.references import tree_noise_multiplier, tree_reference  # noqa: E402
from protocol.dp.events import event_for  # noqa: E402
from protocol.dp.parameters import NoiseDistribution, PrivacyMode, PrivacyParameters  # noqa: E402
from protocol.dp.rounding import rounded_norm_bound_squared  # noqa: E402
from protocol.dp.scaling import derive_encoding  # noqa: E402

DELTA = 1e-5


@pytest.mark.parametrize(
    ("z", "rounds", "sampling", "method", "epsilon"),
    [
        (1.0, 1, 1.0, "pld", 4.3772),
        (1.0, 500, 0.1, "rdp", 18.16),
        (1.0, 500, 0.1, "pld", 16.56),
        (1.0, 500, 1.0, "rdp", 354.86),
        (1.0, 500, 1.0, "pld", 344.45),
    ],
)
def test_gaussian_reference_figures(
    z: float, rounds: int, sampling: float, method: str, epsilon: float
) -> None:
    got = gaussian_reference(
        z,
        rounds=rounds,
        delta=DELTA,
        sampling_probability=sampling,
        method="rdp" if method == "rdp" else "pld",
    )
    assert got == pytest.approx(epsilon, abs=0.006)


def test_single_gaussian_by_its_closed_form() -> None:
    """delta = Phi(1/2z - eps z) - e^eps Phi(-1/2z - eps z) (Balle, Wang 2018, arXiv 1805.06530, Thm 8)."""

    def phi(t: float) -> float:
        return math.erfc(-t / math.sqrt(2)) / 2

    epsilon = gaussian_reference(1.0, rounds=1, delta=DELTA)
    delta = phi(0.5 - epsilon) - math.exp(epsilon) * phi(-0.5 - epsilon)
    assert delta == pytest.approx(DELTA, rel=1e-3)


def test_tree_aggregation() -> None:
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(8.83, 500))
    assert accountant.get_epsilon(DELTA) == pytest.approx(1.416, abs=6e-4)
    ours = tree_reference(8.83, rounds=500, restart_every=500, delta=DELTA)
    assert ours == pytest.approx(1.416, abs=6e-4)


def test_restarts_of_the_tree_compose() -> None:
    """A tree over one round is the Gaussian mechanism, so that restarting every round composes Gaussians."""
    gaussians = gaussian_reference(4.0, rounds=20, delta=DELTA, method="rdp")
    assert tree_reference(4.0, rounds=20, restart_every=1, delta=DELTA) == pytest.approx(gaussians, rel=1e-9)
    whole = tree_reference(4.0, rounds=30, restart_every=30, delta=DELTA)
    assert whole < tree_reference(4.0, rounds=31, restart_every=30, delta=DELTA)
    assert whole < tree_reference(4.0, rounds=30, restart_every=10, delta=DELTA)
    solved = tree_noise_multiplier(epsilon=1.416, rounds=500, restart_every=500, delta=DELTA)
    assert solved == pytest.approx(8.83, rel=2e-3)


def test_noise_multiplier_for_epsilon_eight_under_poisson_sampling() -> None:
    got = dp_accounting.calibrate_dp_mechanism(
        rdp.RdpAccountant,
        lambda z: dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(z)), 500
        ),
        8.0,
        DELTA,
        dp_accounting.ExplicitBracketInterval(1.0, 3.0),
    )
    assert got == pytest.approx(1.636, abs=6e-4)
    assert gaussian_reference(
        1.636, rounds=500, delta=DELTA, sampling_probability=0.1, method="rdp"
    ) == pytest.approx(8.0, abs=0.01)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 4.430), (2.0, 2.011), (10.0, 0.3408)])
def test_discrete_gaussian_in_one_dimension(sigma: float, epsilon: float) -> None:
    """The library's tight figure; our multi-dimensional curve is an upper bound and within its RDP gap."""
    tight = privacy_loss_distribution.from_discrete_gaussian_mechanism(sigma).get_epsilon_for_delta(DELTA)
    assert tight == pytest.approx(epsilon, rel=5e-4)
    assert tight <= gaussian_reference(sigma, rounds=1, delta=DELTA, method="rdp")


def test_the_theorem_of_zero_concentrated_privacy_for_one_discrete_gaussian() -> None:
    """Central noise at z = 1 is 1/2-zCDP (Canonne, Kamath, Steinke 2020, Theorem 4)."""
    privacy = PrivacyParameters(
        mode=PrivacyMode.CENTRAL,
        clip_norm=1.0,
        noise_multiplier=1.0,
        delta=DELTA,
        bits=20,
        noise=NoiseDistribution.DISCRETE_GAUSSIAN,
    )
    params = derive_encoding(
        privacy, dimension=100, minimum_survivors=5, maximum_clients=5, rotation_seed=bytes(32)
    )
    spent = account([event_for(params, 5)] * 500, DELTA)
    assert spent.epsilon == pytest.approx(354.86, abs=0.02)


def tff_heuristic(bits: int, clients: int, dimension: int, clip: float, local_stddev: float) -> float:
    """TFF's scale: k standard deviations of the noisy rounded sum fill the ring, k from 10^-4 a coordinate.

    2^b = 2 k sqrt(s^2 (c^2 n^2 / d + n sigma^2) + n / 4) (Kairouz, Liu, Steinke 2021, rho = 1).
    """
    k = 3.890592
    return math.sqrt(2.0 ** (2 * bits) - clients * k**2) / (
        2 * k * math.sqrt(clip**2 * clients**2 / dimension + clients * local_stddev**2)
    )


def test_the_parameters_of_tff_and_how_ours_differ() -> None:
    """TFF at z = 1, n = 100, 16 bits, d = 50,000 padded to 65,536, C = 0.1, beta = 0.

    The docs derive the difference: TFF multiplies z by C, not by the rounded norm; counts 10^-4 per
    coordinate of a Gaussian, not 2^-20 per round rigorously; and pads to a power of two.
    """
    local = 1.0 * 0.1 / math.sqrt(100)  # central / sqrt(n), as its code has it
    scale = tff_heuristic(16, 100, 65_536, 0.1, local)
    assert scale == pytest.approx(78_450.76, abs=0.01)
    assert scale * local == pytest.approx(784.5076, abs=1e-4)
    assert scale * 0.1 * (1 + 1e-4) + math.sqrt(65_536) == pytest.approx(8101.861, abs=1e-3)
    # So TFF's noise is z * 7845, against a sensitivity of 8102: its true noise multiplier is 0.968.
    assert 10 * scale * local / 8101.861 == pytest.approx(0.9683, abs=1e-4)

    privacy = PrivacyParameters(
        mode=PrivacyMode.DISTRIBUTED, clip_norm=0.1, noise_multiplier=1.0, delta=DELTA, bits=16
    )
    ours = derive_encoding(
        privacy, dimension=50_000, minimum_survivors=100, maximum_clients=100, rotation_seed=bytes(32)
    )
    assert ours.length == 50_000
    assert 0.5 < ours.scale / scale < 0.6  # 7.4 in place of 3.9 standard deviations
    assert math.sqrt(100 * ours.local_variance) == pytest.approx(math.sqrt(ours.norm_bound_squared))
    # The price of the finer bound is small: noise per unit of the parameters grows by rounding alone.
    assert math.sqrt(ours.norm_bound_squared) / ours.radius < 1.002
    assert rounded_norm_bound_squared(7846, 65_536) < 8101**2


def test_the_plan_of_the_tracker() -> None:
    """Cohort 200 of 5,000, 500 rounds, epsilon 4 at delta 10^-6, 16 bits: every device in every round."""
    privacy = PrivacyParameters(
        mode=PrivacyMode.DISTRIBUTED, clip_norm=0.1, noise_multiplier=1.0, delta=1e-6, bits=16
    )
    solved = solve_noise_multiplier(
        privacy,
        Budget(4.0, 1e-6),
        rounds=500,
        dimension=50_000,
        minimum_survivors=140,
        maximum_clients=200,
    )
    reference = gaussian_reference(solved.noise_multiplier, rounds=500, delta=1e-6, method="rdp")
    assert reference == pytest.approx(4.0, rel=2e-3)
