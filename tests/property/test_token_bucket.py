"""A token bucket never gives more than its capacity and its rate, and gives that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.token_bucket import TokenBucket


@given(
    rate=st.floats(0.1, 1e6),
    portion=st.floats(1.0, 1e5),
    steps=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=50),
)
def test_never_more_than_capacity_and_rate(rate: float, portion: float, steps: list[float]) -> None:
    bucket, now, taken = TokenBucket.full(rate, max(rate, portion), 0.0), 0.0, 0.0
    for step in steps:
        now += step
        count = bucket.affords(portion, now)
        assert count * portion <= bucket.capacity * (1 + 1e-6)
        bucket, taken = bucket.spend(count * portion, now), taken + count * portion
        assert taken <= (bucket.capacity + rate * now) * (1 + 1e-6)
        assert bucket.affords(portion, now) == 0
    # It is full again at last: nothing leaks away.
    assert bucket.refilled(now + 2 * bucket.capacity / rate).level == bucket.capacity


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket.full(1.0, 10.0, 100.0).spend(10.0, 100.0)
    assert bucket.affords(1.0, 50.0) == 0 and bucket.refilled(50.0).at == 100.0
    with pytest.raises(ValueError, match="above zero"):
        TokenBucket.full(0.0, 1.0, 0.0)
