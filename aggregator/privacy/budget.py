"""The budget gate: whether another round may start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aggregator.privacy.accountant import account
from protocol.dp.accounting import Spent
from protocol.dp.errors import InvalidParameters
from protocol.dp.events import DPEvent, event_for
from protocol.dp.scaling import EncodingParameters


@dataclass(frozen=True)
class Budget:
    """What a population may spend in all.

    Raises:
        InvalidParameters: epsilon is not positive and finite, or delta is not in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidParameters(f"a budget's epsilon is positive and finite, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise InvalidParameters(f"a budget's delta lies in (0, 1), got {self.delta}")


class BudgetExceeded(Exception):
    """A round was refused: it would spend more than the population's budget.

    Attributes:
        projected: what would have been spent with the round.
        budget: the limit.
    """

    def __init__(self, projected: Spent, already: Spent, budget: Budget) -> None:
        super().__init__(
            f"budget gate: with this round epsilon would be {projected.epsilon:.4g} at delta "
            f"{budget.delta:g} after {projected.rounds} rounds; the population's limit is "
            f"{budget.epsilon:.4g}, of which {already.epsilon:.4g} is spent"
        )
        self.projected = projected
        self.budget = budget


def check_budget(events: Sequence[DPEvent], planned: EncodingParameters, budget: Budget) -> Spent:
    """The budget gate: says what would be spent with one more round, or refuses the round.

    The round is costed at its minimum number of survivors, which is the dearest outcome that it accepts; what
    it really cost is accounted from its own event afterwards. `BudgetExceeded` carries figure and rule.

    Guarantee: if every round passes this gate first, the population's epsilon never exceeds its budget.
    Assumes: `events` holds every release to the population so far.

    Raises:
        BudgetExceeded: the projected epsilon is above the budget's; always so without noise.
    """
    projected = account([*events, event_for(planned, planned.minimum_survivors)], budget.delta)
    if not projected.epsilon <= budget.epsilon:
        raise BudgetExceeded(projected, account(events, budget.delta), budget)
    return projected
