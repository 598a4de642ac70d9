"""Costs move the right way: more noise, more survivors and fewer rounds never cost more."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("dp_accounting")

from aggregator.privacy import account
from protocol.dp.divergence import ORDERS, renyi_divergence
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.parameters import PrivacyMode


@st.composite
def events(draw: st.DrawFn) -> DPEvent:
    sensitivity = draw(st.integers(100, 10**10))
    z = draw(st.floats(0.3, 30))
    survivors = draw(st.integers(1, 500))
    colluders = draw(st.integers(0, survivors - 1))
    return DPEvent(
        mechanism=draw(st.sampled_from([Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN])),
        mode=draw(st.sampled_from([PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED])),
        noise_multiplier=z,
        clip_norm=1.0,
        sensitivity_squared=sensitivity,
        variance_per_share=z**2 * sensitivity / (survivors - colluders),
        dimension=draw(st.integers(1, 10**7)),
        survivors=survivors,
        minimum_survivors=1,
        colluders=colluders,
        sampler_distance=0.0,
    )


@given(events(), st.integers(1, 50))
@settings(max_examples=60)
def test_costs_are_monotone(event: DPEvent, rounds: int) -> None:
    cost = account([event] * rounds, 1e-5).epsilon
    quieter = event.model_copy(update={"variance_per_share": event.variance_per_share * 0.9})
    assert account([quieter] * rounds, 1e-5).epsilon >= cost * (1 - 1e-9)
    fuller = event.model_copy(update={"survivors": event.survivors + 1})
    assert account([fuller] * rounds, 1e-5).epsilon <= cost * (1 + 1e-9)
    assert account([event] * (rounds + 1), 1e-5).epsilon >= cost * (1 - 1e-12)
    assert account([event] * rounds, 1e-6).epsilon >= cost * (1 - 1e-12)


@given(events())
@settings(max_examples=60)
def test_bounds_never_fall_below_the_continuous_gaussian(event: DPEvent) -> None:
    """At variances of 9 and more no theorem here gives less; a lower bound would betray a wrong formula."""
    assume(event.variance >= 9)
    gaussian = event.sensitivity_squared / (2 * event.variance)
    for order in ORDERS[::10]:
        assert renyi_divergence(event, order) >= order * gaussian * (1 - 1e-9)
