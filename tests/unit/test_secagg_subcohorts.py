"""A split cohort: everyone once, by the seed; every client checks its own; and the sums add up."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
from pydantic import ValidationError

from protocol.plan import CohortParameters
from protocol.secagg.parameters import GraphAssumptions, NoGraph, parameters
from protocol.secagg.server_state import Recovered
from protocol.secagg.subcohorts import Split, most_marked
from tests.secagg_round import PLAN_HASH, Cohort, entropy

DEVICES = [f"device-{i:03d}" for i in range(103)]


@pytest.mark.parametrize(("limit", "count"), [(200, 1), (103, 1), (60, 2), (10, 11)])
def test_everyone_is_in_exactly_one_which_a_device_can_tell_by_itself(limit: int, count: int) -> None:
    split = Split.of(len(DEVICES), limit)
    parts = split.parts(reversed(DEVICES), entropy("plan"))
    assert len(parts) == split.count == count
    assert sorted(device for part in parts for device in part) == DEVICES
    assert all(list(part) == sorted(part) for part in parts)
    for number, part in enumerate(parts):
        assert {split.number_of(device, entropy("plan")) for device in part} <= {number}
    assert max(map(len, parts)) <= split.largest
    assert (split.parts(DEVICES, entropy("another plan")) == parts) == (count == 1)


def test_no_sub_cohort_is_larger_than_the_bound_says() -> None:
    """Of 400 draws of 25 parts, none passes a bound that fails once in a million times."""
    split = Split(2_500, 25)
    rng = np.random.default_rng(1)
    sizes = rng.multinomial(2_500, [1 / 25] * 25, size=400)
    assert 100 < sizes.max() <= split.largest < 200


def test_the_sums_of_sub_cohorts_add_up() -> None:
    """Two rosters of their own; one loses a client, which changes nothing for the other."""
    total, expected = np.zeros(50, np.uint32), np.zeros(50, np.uint32)
    for size, drops in ((5, {"upload": {"device-004"}}), (4, {})):
        cohort = Cohort(size, reboot=False)
        end = cohort.run(drops)
        assert isinstance(end, Recovered)
        total += cohort.unmasked(end)
        expected += cohort.sum_of(cohort.names(end.survivors))
    np.testing.assert_array_equal(total, expected)


def test_a_roster_across_sub_cohorts_is_refused() -> None:
    """An aggregator that mixes them could choose who is with whom."""
    split = Split(12, 2)
    assert len({split.number_of(f"device-{i:03d}", PLAN_HASH) for i in range(6)}) == 2
    cohort = Cohort(6, split=split)
    cohort.advertise()
    cohort.exchange()
    assert {abort.code for abort in cohort.aborts.values()} == {"wrong-subcohort"}
    assert len(cohort.aborts) == 6


def test_the_graph_of_a_sub_cohort_is_sized_for_the_corrupt_members_that_it_may_have() -> None:
    whole, split = GraphAssumptions(), Split(4_000, 10)
    part = split.assumptions(400, whole)
    assert Split(4_000).assumptions(400, whole) == whole
    assert floor(part.corrupt_fraction * 400) == most_marked(4_000, 0.1, 400) > 40
    assert floor(part.dropout_fraction * 400) > 40
    assert parameters(400, part).degree > parameters(400, whole).degree
    with pytest.raises(NoGraph, match="make sub-cohorts larger"):
        split.assumptions(30, whole)


def test_the_corrupt_fraction_of_a_sub_cohort_is_bounded() -> None:
    assert most_marked(10_000, 0.1, 10_000) == 1_000
    bounds = [most_marked(10_000, 0.1, size) / size for size in (10_000, 5_000, 1_000, 200)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.4
    assert most_marked(10_000, 0.0, 100) == 0
    # Against sampling: far fewer bits, so that the bound is reached now and then, and hardly ever passed.
    rng = np.random.default_rng(1)
    bound = most_marked(2_000, 0.1, 200, bits=4)
    worst = [rng.permutation(2_000).reshape(10, 200).__lt__(200).sum(axis=1).max() for _ in range(400)]
    assert np.mean(np.array(worst) > bound) <= 2**-4 + 0.03  # false alarm below 1 %
    assert np.mean(np.array(worst) > bound - 6) > 2**-4


def test_a_plan_whose_sub_cohorts_cannot_have_its_minimum_is_refused() -> None:
    assert CohortParameters(size=40, minimum=10, minimum_survivors=5, subcohort_limit=10).split == Split(
        40, 4
    )
    with pytest.raises(ValidationError, match="4 sub-cohorts have 10 devices on average"):
        CohortParameters(size=40, minimum=11, minimum_survivors=5, subcohort_limit=10)
