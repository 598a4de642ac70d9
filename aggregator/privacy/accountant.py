"""The aggregator's accountant: our events, composed and converted by `dp_accounting`.

A single discrete Gaussian is the library's zCDP event. Sums of discrete Gaussians and Skellam noise it lacks;
their curves are in `protocol.dp.divergence`. No amplification by sampling is ever assumed for these: devices
that check in when they can are no Poisson sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import dp_accounting
import numpy as np
from dp_accounting import rdp

from protocol.dp.accounting import Spent, spent_by
from protocol.dp.divergence import ORDERS, renyi_curve
from protocol.dp.events import DPEvent, Mechanism


@dataclass(frozen=True)
class RingDpEvent(dp_accounting.DpEvent):  # type: ignore[misc]  # the library has no type stubs
    """Carries one of our events through the library's composition."""

    event: DPEvent


class RingRdpAccountant(rdp.RdpAccountant):  # type: ignore[misc]
    """The library's Renyi accountant, which also knows integer noise in the ring.

    Guarantee: an upper bound on the Renyi divergence at every order, whatever was composed adaptively.
    Assumes: one neighbouring relation for all events: a device's vector is replaced by zeros, or the device
        is added or removed. The bounds are the same, since both move the sum by one clipped vector.
    """

    def __init__(self) -> None:
        super().__init__(ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> object:
        if not isinstance(event, RingDpEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp += count * np.array(renyi_curve(event.event))
        return None


def account(events: Sequence[DPEvent], delta: float) -> Spent:
    """Returns what the events cost together, by Renyi composition.

    The conversion is the library's (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, Proposition 12).

    Assumes: no device was in two rounds of one noise tree; selection and the devices' own gates see to that.

    Args:
        events: in any order; from one population.
        delta: in (0, 1).
    """
    counted = Counter(_once_a_tree(events))
    accountant = RingRdpAccountant()
    for event, count in counted.items():
        accountant.compose(_library_event(event), count)
    spent = spent_by(counted, delta, lambda available: float(accountant.get_epsilon(available)))
    return replace(spent, rounds=len(events))


def _once_a_tree(events: Sequence[DPEvent]) -> list[DPEvent]:
    """The events with the dearest round of each noise tree alone: a device is in one round of a tree."""
    trees: dict[str, DPEvent] = {}
    others = []
    for event in events:
        if event.tree is None:
            others.append(event)
            continue
        known = trees.get(event.tree)
        if known is None or sum(renyi_curve(event)) > sum(renyi_curve(known)):
            trees[event.tree] = event
    return [*others, *(event.model_copy(update={"tree": None}) for event in trees.values())]


def _library_event(event: DPEvent) -> dp_accounting.DpEvent:
    """Maps an event to the library's where it has one."""
    if event.mechanism is Mechanism.NONE:
        return dp_accounting.NonPrivateDpEvent()
    alone = event.shares == event.sums == event.sampling_probability == 1
    if event.mechanism is Mechanism.DISCRETE_GAUSSIAN and alone:
        # Canonne, Kamath, Steinke 2020, arXiv 2004.00010, Theorem 4, and divergences add over coordinates.
        return dp_accounting.ZCDpEvent(event.sensitivity_squared / (2 * event.variance))
    return RingDpEvent(event)
