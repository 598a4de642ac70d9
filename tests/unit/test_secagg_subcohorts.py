"""A split cohort: everyone once, evenly, by the seed; and its sums add up to the whole sum."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.secagg.server_state import Recovered
from protocol.secagg.subcohorts import corrupt_fraction_bound, sub_cohorts
from tests.secagg_round import Cohort, entropy

DEVICES = [f"device-{i:03d}" for i in range(103)]


@pytest.mark.parametrize(("limit", "sizes"), [(200, [103]), (103, [103]), (60, [51, 52]), (10, [9, 10])])
def test_everyone_is_in_exactly_one_and_sizes_are_even(limit: int, sizes: list[int]) -> None:
    parts = sub_cohorts(DEVICES, entropy("plan"), limit)
    assert sorted(device for part in parts for device in part) == DEVICES
    assert sorted({len(part) for part in parts}) == sizes
    assert all(list(part) == sorted(part) for part in parts)


def test_the_seed_alone_decides_whatever_order_the_devices_come_in() -> None:
    parts = sub_cohorts(DEVICES, entropy("plan"), 20)
    assert sub_cohorts(list(reversed(DEVICES)), entropy("plan"), 20) == parts
    assert sub_cohorts(DEVICES, entropy("another plan"), 20) != parts


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot split"):
        sub_cohorts(DEVICES, entropy("plan"), 1)
    with pytest.raises(ValueError, match="cannot split"):
        sub_cohorts(["a", "a"], entropy("plan"), 5)
    assert sub_cohorts([], entropy("plan"), 5) == ()


def test_the_sums_of_sub_cohorts_add_up() -> None:
    """Two rounds of their own; one loses a client, which changes nothing for the other."""
    total, expected = np.zeros(50, np.uint32), np.zeros(50, np.uint32)
    for size, drops in ((5, {"upload": {"device-004"}}), (4, {})):
        cohort = Cohort(size, reboot=False)
        end = cohort.run(drops)
        assert isinstance(end, Recovered)
        total += cohort.unmasked(end)
        expected += cohort.sum_of(cohort.names(end.survivors))
    np.testing.assert_array_equal(total, expected)


def test_the_corrupt_fraction_of_a_sub_cohort_is_bounded() -> None:
    whole = corrupt_fraction_bound(10_000, 0.1, 10_000)
    assert whole == 0.1
    bounds = [corrupt_fraction_bound(10_000, 0.1, size) for size in (5_000, 1_000, 200)]
    assert whole < bounds[0] < bounds[1] < bounds[2] < 0.4
    assert corrupt_fraction_bound(10_000, 0.0, 100) == 0.0
    # Against sampling: far fewer bits, so that the bound is reached now and then, and hardly ever passed.
    rng = np.random.default_rng(1)
    bound = corrupt_fraction_bound(2_000, 0.1, 200, bits=4)
    worst = [rng.permutation(2_000).reshape(10, 200).__lt__(200).mean(axis=1).max() for _ in range(400)]
    assert np.mean(np.array(worst) > bound) <= 2**-4 + 0.03  # false alarm below 1 %
    assert np.mean(np.array(worst) > bound - 0.03) > 2**-4
