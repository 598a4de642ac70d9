"""DP-FTRL's tree: which noise is in which sum, that it is drawn once, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2

from aggregator.privacy.accountant import account
from aggregator.privacy.references import tree_reference
from protocol import ring
from protocol.dp.accounting import spend
from protocol.dp.errors import NoiseKeyError
from protocol.dp.events import DPEvent, event_for
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode
from protocol.dp.parameters import (
    AdaptiveClipping,
    MetricSlot,
    NoiseDistribution,
    PrivacyMode,
    PrivacyParameters,
    TreeNoise,
)
from protocol.dp.sampling import discrete_gaussian_sampler
from protocol.dp.tree import add_increment, increment, nodes, rotation_seed

KEY = bytes(range(32))
TREE = "ab" * 32


def privacy(leaf: int = 1, restart_every: int = 8, z: float = 1.0, **changes: Any) -> PrivacyParameters:
    figures: dict[str, Any] = {
        "mode": PrivacyMode.CENTRAL,
        "clip_norm": 1.0,
        "noise_multiplier": z,
        "delta": 1e-5,
        "bits": 28,
        "tree": TreeNoise(restart_every=restart_every, tree=TREE, leaf=leaf),
    }
    return PrivacyParameters(**figures | changes)


def encoding(parameters: PrivacyParameters, dimension: int = 50, clients: int = 5) -> EncodingParameters:
    seed = rotation_seed(parameters.tree) if parameters.tree else bytes(32)
    return derive_encoding(
        parameters, dimension=dimension, minimum_survivors=3, maximum_clients=clients, rotation_seed=seed
    )


def covered(found: frozenset[tuple[int, int]]) -> list[int]:
    return sorted(
        leaf for level, place in found for leaf in range((place << level) + 1, ((place + 1) << level) + 1)
    )


@given(st.integers(0, 5000))
def test_nodes_cover_every_leaf_once(leaf: int) -> None:
    assert covered(nodes(leaf)) == list(range(1, leaf + 1))
    assert len(nodes(leaf)) == leaf.bit_count()


@given(st.integers(1, 300), st.data())
def test_no_leaf_is_in_more_sums_than_it_is_charged_for(restart_every: int, data: st.DataObject) -> None:
    leaf = data.draw(st.integers(1, restart_every))
    every = frozenset().union(*(nodes(end) for end in range(1, restart_every + 1)))
    holding = [node for node in every if leaf in covered(frozenset({node}))]
    assert len(holding) <= TreeNoise(restart_every=restart_every).height
    assert TreeNoise(restart_every=restart_every).height == math.ceil(math.log2(restart_every + 1))


@given(st.sets(st.integers(1, 200), min_size=1))
def test_increments_add_up_to_the_nodes_of_the_last_leaf(leaves: set[int]) -> None:
    """Whichever rounds were aborted in between."""
    held: set[tuple[int, int]] = set()
    after = 0
    for leaf in sorted(leaves):
        coming, going = increment(after, leaf)
        assert going <= held and not coming & held
        assert len(coming) + len(going) <= 2 * leaf.bit_length()
        held = (held - going) | coming
        after = leaf
    assert held == nodes(after)


def test_prefix_sums_have_exactly_the_trees_variance() -> None:
    """Sum of squares over 20,000 coordinates for each of 21 prefixes; false alarm below 10^-6 in all.

    Independent noise in every round would have 20 sigma^2 where the tree has 2.
    """
    size, sigma_squared = 20_000, 30.0**2
    sampler = discrete_gaussian_sampler(sigma_squared)
    total = np.zeros(size, np.int64)
    for leaf in range(1, 22):
        integers = np.zeros(size, np.int32)
        add_increment(integers, sampler, KEY, after=leaf - 1, leaf=leaf)
        total += integers
        normal = (total.astype(np.float64) ** 2).sum() / (leaf.bit_count() * sigma_squared)
        assert chi2.isf(1 - 2e-8, size) < normal < chi2.isf(2e-8, size)


def test_the_same_release_gives_the_same_noise_and_no_leaf_is_released_twice() -> None:
    sampler = discrete_gaussian_sampler(100.0)

    def noise(key: bytes, after: int, leaf: int) -> list[int]:
        integers = np.zeros(10, np.int32)
        add_increment(integers, sampler, key, after=after, leaf=leaf)
        return integers.tolist()

    assert noise(KEY, 3, 4) == noise(KEY, 3, 4) != noise(KEY, 2, 4)
    assert noise(KEY, 0, 1) != noise(bytes(32), 0, 1)
    for after in (4, 5):
        with pytest.raises(NoiseKeyError, match="does not follow"):
            noise(KEY, after, 4)


def test_the_sum_of_released_updates_has_the_noise_of_the_tree_alone() -> None:
    """Real encoding and decoding of eight rounds, with a slot and a changing number of survivors."""
    rng = np.random.default_rng(5)
    slot = MetricSlot(name="loss", bound=1.0)
    truth, released = np.zeros(50), np.zeros(50)
    last = 0
    for leaf, survivors in ((1, 5), (2, 3), (3, 4), (5, 5), (6, 3), (7, 4), (8, 5)):
        params = encoding(privacy(leaf, z=0.5, metric_slots=(slot,)))
        total = np.zeros(params.length, np.uint32)
        for client in range(survivors):
            update = rng.normal(size=50).astype(np.float32)
            update /= np.float32(2 * np.linalg.norm(update))
            truth += update / 5
            vector = encode(update, {"loss": 0.5}, params, bytes([leaf, client]) * 16)
            ring.add(total, vector, params.bits, out=total)
        mean, metrics = decode(total, survivors, params, noise_key=KEY, after_leaf=last)
        released += mean
        last = leaf
        # The mean of a metric is over those who answered, as without a tree.
        spread = math.sqrt(params.central_draws * params.central_variance) / (params.scale * survivors * 0.1)
        assert abs(metrics["loss"] - 0.5) < 6 * spread
    # After leaf 8 a single node's noise is left.
    deviation = math.sqrt(params.central_variance) / (params.scale * 5)
    squares = ((released - truth) ** 2).sum() / deviation**2
    assert chi2.isf(1 - 1e-6, 50) < squares < 1.05 * chi2.isf(1e-6, 50)


def test_the_ring_is_wide_enough_for_the_noise_that_comes_and_goes() -> None:
    with_tree = encoding(privacy(restart_every=100, bits=12))
    without = encoding(privacy(bits=12, tree=None))
    assert with_tree.central_draws == 14 and without.central_draws == 1
    assert with_tree.radius < without.radius
    assert with_tree.overflow_probability <= 2**-20


def tree_event(z: float, restart_every: int, tree: str = TREE) -> DPEvent:
    parameters = privacy(restart_every=restart_every, z=z, bits=32, noise=NoiseDistribution.DISCRETE_GAUSSIAN)
    parameters = parameters.model_copy(update={"tree": TreeNoise(restart_every=restart_every, tree=tree)})
    return event_for(encoding(parameters), 3)


def test_it_costs_what_the_theorem_and_the_library_say() -> None:
    """500 rounds of one tree at z = 8.83: epsilon 1.416 at delta 1e-5 (dp_accounting 0.6.0)."""
    event = tree_event(8.83, 500)
    spent = account([event] * 500, 1e-5)
    assert spent.epsilon == pytest.approx(1.416, abs=1e-3) and spent.rounds == 500
    assert spent.epsilon == pytest.approx(
        tree_reference(8.83, rounds=500, restart_every=500, delta=1e-5), rel=2e-3
    )
    # A device counts its own single contribution, and needs no library.
    assert spend({event: 1}, 1e-5).epsilon == pytest.approx(spent.epsilon, rel=1e-3)


def test_restarts_compose() -> None:
    events = [tree_event(20.0, 100, f"{number:064x}") for number in range(5) for _ in range(100)]
    assert account(events, 1e-5).epsilon == pytest.approx(
        tree_reference(20.0, rounds=500, restart_every=100, delta=1e-5), rel=2e-3
    )
    # A tree counts once however many of its rounds there were, and the dearest of them counts.
    few = account([events[0], events[100], events[200]], 1e-5)
    assert few.epsilon == pytest.approx(account(events[:300], 1e-5).epsilon)
    dear = events[0].model_copy(update={"variance_per_share": events[0].variance_per_share / 4})
    for order in ([dear, events[1]], [events[1], dear]):
        assert account(order, 1e-5).epsilon == account([dear], 1e-5).epsilon


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": PrivacyMode.DISTRIBUTED},
        {"mode": PrivacyMode.NONE, "noise_multiplier": 0.0},
        {"adaptive": AdaptiveClipping()},
    ],
)
def test_plans_without_a_use_for_a_tree_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="mode central"):
        privacy(**changes)
    for restart_every, leaf in ((4, 5), (0, 1), (4, 0)):
        with pytest.raises(ValidationError):
            TreeNoise(restart_every=restart_every, leaf=leaf)


def test_all_rounds_of_a_tree_share_their_coordinates() -> None:
    first, second = (TreeNoise(restart_every=8, tree=TREE, leaf=leaf) for leaf in (1, 5))
    assert rotation_seed(first) == rotation_seed(second)
    assert rotation_seed(first) != rotation_seed(TreeNoise(restart_every=8, tree="cd" * 32))
