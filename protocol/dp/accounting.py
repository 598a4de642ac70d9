"""What a list of events costs, by Renyi composition, in plain arithmetic: the device's own accountant.

The aggregator composes the same curves through `dp_accounting` (`aggregator.privacy.accountant`); a test
holds one against the other. A device must not have to believe the aggregator, nor carry that library's 50 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protocol.dp.divergence import ORDERS, renyi_curve
from protocol.dp.errors import InvalidParameters
from protocol.dp.events import DPEvent


@dataclass(frozen=True)
class Spent:
    """What a list of events costs: (epsilon, delta) for one device, or example, that was in all of them.

    Attributes:
        epsilon: infinite if any event had no noise.
        delta: the delta at which epsilon holds.
        rounds: how many events.
        sampler_distance: total-variation distance of all noise draws together from the ideal distributions.
        sampler_included: whether delta already holds (1 + e^epsilon) * sampler_distance. It does not fit
            where epsilon is beyond about 40: then the figures are those of the ideal mechanism, and the real
            one can be told from it with an advantage of at most `sampler_distance`.
        unit: who that is.
    """

    epsilon: float
    delta: float
    rounds: int
    sampler_distance: float = 0.0
    sampler_included: bool = True
    unit: str = "device"

    def __str__(self) -> str:
        return f"({self.epsilon:.4g}, {self.delta:g})-DP per {self.unit} after {self.rounds} rounds"


def spend(events: Mapping[DPEvent, int], delta: float) -> Spent:
    """Bounds what the events cost together, each as often as it happened.

    Divergences of adaptively composed mechanisms add at every order (Mironov 2017, arXiv 1702.07476,
    Proposition 1).

    Guarantee: an upper bound, up to float rounding, for the neighbouring relation of the events.

    Args:
        events: how often each happened.
        delta: in (0, 1).

    Raises:
        InvalidParameters: delta is not in (0, 1).
    """
    curve = [0.0] * len(ORDERS)
    for event, count in events.items():
        curve = [total + count * cost for total, cost in zip(curve, renyi_curve(event), strict=True)]
    return spent_by(events, delta, lambda available: epsilon_of_curve(curve, available))


def epsilon_of_curve(curve: list[float], delta: float) -> float:
    """Converts divergences at `ORDERS` to epsilon.

    epsilon = D_alpha + ln(1 - 1/alpha) - ln(alpha delta) / (alpha - 1), the least over alpha (Canonne,
    Kamath, Steinke 2020, arXiv 2004.00010, Proposition 12); 0 where the divergence alone bounds the total
    variation by delta (Bretagnolle, Huber 1979: at most sqrt(1 - e^-D)).
    """
    if any(delta**2 + math.expm1(-cost) > 0 for cost in curve):
        return 0.0
    least = min(
        cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, cost in zip(ORDERS, curve, strict=True)
    )
    return max(0.0, least)


def spent_by(events: Mapping[DPEvent, int], delta: float, epsilon_at: Callable[[float], float]) -> Spent:
    """Completes an accountant's answer by what the noise tables' rounding costs.

    The tables' distance T turns (epsilon, delta) into (epsilon, delta + (1 + e^epsilon) T), by the triangle
    inequality on both neighbouring inputs; that is taken out of delta first.

    Args:
        events: how often each happened.
        delta: in (0, 1).
        epsilon_at: epsilon of the ideal mechanism as a function of delta.

    Raises:
        InvalidParameters: delta is not in (0, 1), or the events are about different units.
    """
    if not 0 < delta < 1:
        raise InvalidParameters(f"delta lies in (0, 1), got {delta}")
    units = {event.unit for event in events} or {"device"}
    if len(units) > 1:
        raise InvalidParameters("events that hide a device and events that hide an example do not add up")
    distance = sum(
        count * event.sums * event.shares * event.dimension * event.sampler_distance
        for event, count in events.items()
    )
    epsilon = epsilon_at(delta)
    included = distance == 0
    if not included and epsilon < 700:
        # Half of delta is far more than the tables take below epsilon 40, so that one step is enough.
        reserve = 2 * (1 + math.exp(epsilon)) * distance
        if reserve < delta / 2:
            stricter = epsilon_at(delta - reserve)
            if (1 + math.exp(stricter)) * distance <= reserve:
                epsilon, included = stricter, True
    return Spent(epsilon, delta, sum(events.values()), float(distance), included, units.pop())
