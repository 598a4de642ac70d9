"""The noise that a budget needs."""

from __future__ import annotations

import math

from aggregator.privacy.accountant import account
from aggregator.privacy.budget import Budget
from protocol.dp.accounting import spend
from protocol.dp.errors import InvalidParameters, RingTooNarrow
from protocol.dp.events import event_for
from protocol.dp.parameters import PrivacyParameters
from protocol.dp.scaling import derive_encoding

_MAX_NOISE_MULTIPLIER = 1e4
_NOISE_GRID = 1e-4  # solved multipliers are rounded up to it: short numbers in plans, never less noise


class NoiseUnsolvable(InvalidParameters):
    """No noise multiplier reaches the budget with these figures."""


def solve_noise_multiplier(
    privacy: PrivacyParameters,
    budget: Budget,
    *,
    rounds: int,
    dimension: int,
    minimum_survivors: int,
    maximum_clients: int,
) -> PrivacyParameters:
    """Finds the least noise that keeps `rounds` rounds within the budget for a device in all it may join.

    Args:
        privacy: everything but the noise multiplier, whose value is replaced.
        budget: epsilon and delta; the result's delta is the budget's.

    Returns:
        The parameters with z rounded up to 10^-4.

    Raises:
        NoiseUnsolvable: a round without noise, no rounds, or a budget that no multiplier reaches.
        RingTooNarrow: the ring cannot hold the noise that the budget needs.
    """
    if rounds < 1:
        raise NoiseUnsolvable(f"need at least one round, got {rounds}")

    def spent_with(steps: int) -> tuple[PrivacyParameters, float]:
        changed = privacy.model_copy(update={"noise_multiplier": steps * _NOISE_GRID, "delta": budget.delta})
        encoding = derive_encoding(
            changed,
            dimension=dimension,
            minimum_survivors=minimum_survivors,
            maximum_clients=maximum_clients,
            rotation_seed=bytes(32),
        )
        event = event_for(encoding, minimum_survivors)
        if changed.tree is not None:
            return changed, spend(
                {event: math.ceil(rounds / changed.tree.restart_every)}, budget.delta
            ).epsilon
        return changed, account([event] * rounds, budget.delta).epsilon

    def too_little(steps: int) -> bool:
        try:
            return spent_with(steps)[1] > budget.epsilon
        except RingTooNarrow:
            return False  # noise beyond the ring: the search goes on below it, and the last line decides

    low, high = 0, 1
    while too_little(high):
        low, high = high, 2 * high
        if high * _NOISE_GRID > _MAX_NOISE_MULTIPLIER:
            raise NoiseUnsolvable(
                f"no noise multiplier up to {_MAX_NOISE_MULTIPLIER:g} keeps {rounds} rounds in mode "
                f"{privacy.mode} within epsilon {budget.epsilon:g}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return spent_with(high)[0]
