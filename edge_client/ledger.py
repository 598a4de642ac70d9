"""The device's own record of what it gave: one entry for every masked input, made before it is offered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from protocol.dp.accounting import Spent, spend
from protocol.dp.events import DPEvent, Mechanism, for_one_example
from protocol.fields import RoundId, Sha256, Slug, UnixTime
from protocol.plan import Task

DAY = 86_400


class LedgerEntry(BaseModel):
    """One contribution.

    It is entered when the masked input is made, whether or not the round completes: a device cannot know what
    became of an input that it handed out. `event` assumes the fewest survivors that the plan allows, which is
    the worst case for this device.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    round_id: RoundId
    at: UnixTime
    fleet: Slug
    task: Task
    plan_sha256: Sha256
    signer: Sha256
    delta: Annotated[float, Field(gt=0, lt=1)]
    event: DPEvent


@dataclass(frozen=True)
class DaySpent:
    """Contributions of one day that were protected alike; a year of them takes a few kilobytes.

    Attributes:
        day: days since 1970.
        count: how many.
    """

    day: int
    event: DPEvent
    count: int


@dataclass(frozen=True)
class History:
    """What this device has contributed so far.

    Attributes:
        contributed_at: when masked inputs of the last day were made, seconds since 1970, ascending.
        days: every contribution there ever was, by day.
    """

    contributed_at: tuple[int, ...] = ()
    days: tuple[DaySpent, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[LedgerEntry]) -> Self:
        """The history that a ledger tells."""
        ordered = sorted(entries, key=lambda entry: entry.at)
        days = Counter((entry.at // DAY, entry.event) for entry in ordered)
        return cls(
            tuple(entry.at for entry in ordered),
            tuple(DaySpent(day, event, count) for (day, event), count in days.items()),
        )

    def within_day(self, now: int) -> int:
        """Contributions in the 24 hours before `now`; those that a corrected clock put after it count too."""
        return sum(at > now - DAY for at in self.contributed_at)

    def with_contribution(self, at: int, event: DPEvent) -> History:
        """The history after one more; times that are older than a day are forgotten, what was spent never."""
        days = {(spent.day, spent.event): spent.count for spent in self.days}
        days[at // DAY, event] = days.get((at // DAY, event), 0) + 1
        return History(
            (*(time for time in self.contributed_at if time > at - DAY), at),
            tuple(DaySpent(day, spent, count) for (day, spent), count in days.items()),
        )

    def events(self, now: int, period_days: int) -> Counter[DPEvent]:
        """Contributions with noise in the last `period_days` days, today included, whatever they hide.

        Days are counted whole, and those after `now` too, so that a wrong clock hides nothing.
        """
        first = now // DAY - period_days + 1
        found: Counter[DPEvent] = Counter()
        for spent in self.days:
            if spent.day >= first and spent.event.mechanism is not Mechanism.NONE:
                found[spent.event] += spent.count
        return found

    def contributed_to(self, tree: str) -> bool:
        """Whether any contribution was to a round of this noise tree."""
        return any(spent.event.tree == tree for spent in self.days)

    def hiding_examples(self) -> int:
        """Contributions that hide the device's examples and not the device: mode `example`."""
        return sum(spent.count for spent in self.days if spent.event.unit == "example")

    def without_noise(self) -> int:
        """Contributions to which no epsilon belongs: the owner's policy allowed the mode `none`."""
        return sum(spent.count for spent in self.days if spent.event.mechanism is Mechanism.NONE)

    def spent(self, now: int, period_days: int, delta: float, planned: DPEvent | None = None) -> Spent:
        """Bounds what the last `period_days` days cost this device, and one planned contribution on top.

        Contributions that hide examples only are left out: none of them has an epsilon of the device.

        Guarantee: computed here from the device's own record and the signed plan; nothing that the aggregator
            says about costs enters.
        """
        events = self.events(now, period_days) + Counter(() if planned is None else (planned,))
        return spend({event: count for event, count in events.items() if event.unit == "device"}, delta)

    def spent_on_an_example(
        self, now: int, period_days: int, delta: float, planned: DPEvent | None = None
    ) -> Spent:
        """The same for one example of this device, over its contributions in every mode with noise."""
        costs: Counter[DPEvent] = Counter()
        events = self.events(now, period_days) + Counter(() if planned is None else (planned,))
        for event, count in events.items():
            costs[for_one_example(event)] += count
        return replace(spend(costs, delta), unit="example")
