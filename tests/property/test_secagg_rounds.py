"""Properties of whole rounds: the sum is exact for every dropout pattern, or there is no sum."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.secagg.parameters import GraphAssumptions
from protocol.secagg.server_state import Failed, Recovered
from tests.secagg_round import Cohort

PHASES = ("advertise", "share", "deliver", "upload", "check", "unmask")


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, dict[str, set[str]]]:
    size = draw(st.integers(3, 9))
    drops: dict[str, set[str]] = {}
    for index in range(size):
        phase = draw(st.sampled_from([None, None, None, *PHASES]))
        if phase is not None:
            drops.setdefault(phase, set()).add(f"device-{index:03d}")
    return size, drops


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds())
def test_the_unmasked_sum_is_the_plain_sum_of_the_survivors(case: tuple[int, dict[str, set[str]]]) -> None:
    size, drops = case
    cohort = Cohort(size)
    end = cohort.run(drops)
    gone = {phase: drops.get(phase, set()) for phase in PHASES}
    roster = size - len(gone["advertise"])
    threshold = 2 * roster // 3 + 1
    left = roster - len(gone["share"] | gone["deliver"] | gone["upload"])
    answering = left - len(gone["check"] | gone["unmask"])
    if isinstance(end, Failed):
        assert roster < 2 or answering < threshold, f"{end.code} with {answering} of {roster} at {threshold}"
        return
    assert isinstance(end, Recovered)
    survivors = cohort.names(end.survivors)
    assert survivors == set(cohort.inputs) - set().union(
        *(gone[phase] for phase in ("advertise", "share", "deliver", "upload"))
    )
    np.testing.assert_array_equal(cohort.unmasked(end), cohort.sum_of(survivors))
    assert not end.misbehaved
    assert not cohort.aborts


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(0, 69), max_size=7), st.sampled_from(["share", "deliver", "upload", "check"]))
def test_a_regular_graph_gives_the_plain_sum_too(dropped: set[int], phase: str) -> None:
    graph = GraphAssumptions(corrupt_fraction=0.05, adversary="semi-honest")
    cohort = Cohort(70, length=20, reboot=False, graph=graph)
    devices = {f"device-{index:03d}" for index in dropped}
    end = cohort.run({phase: devices})
    assert isinstance(end, Recovered), end
    assert not end.cohort.graph.complete
    survivors = cohort.names(end.survivors)
    assert survivors == set(cohort.inputs) - (set() if phase == "check" else devices)
    np.testing.assert_array_equal(cohort.unmasked(end), cohort.sum_of(survivors))
    assert not cohort.aborts


def test_the_sum_without_unmasking_says_nothing() -> None:
    """A masked input, and the sum of all but one, are uniform: chi-squared over 256 values, p > 1e-6.

    The inputs are all zero here, so anything that is not mask would show at once.
    """
    cohort = Cohort(4, length=40_000, reboot=False)
    for device in cohort.inputs:
        cohort.inputs[device][:] = 0
    cohort.advertise()
    cohort.exchange()
    cohort.deliver()
    masked = [cohort.masked(device) for device in sorted(cohort.inputs)]
    for vector in (*masked, np.add.reduce(masked, dtype=np.uint32)):
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < 380, "255 degrees of freedom: the 1 - 1e-6 quantile is 376.9"
