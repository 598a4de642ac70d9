"""One round as the aggregator runs it: its sub-cohorts, side by side.

Theory of operation. A plan splits its cohort into sub-cohorts (`protocol.secagg.subcohorts`), most often into
one. Each of them is a state machine of its own (`aggregator.rounds.subcohort`), with its own roster, phases,
deadlines and survivors, which neither waits for the others nor fails with them. A device's sub-cohort follows
from its name and the plan, so that this machine only hands each event to whom it concerns:

    an event of a device   -> its sub-cohort
    Tick, Reconnected      -> all of them

The round has ended when every sub-cohort has. It completes if at least half of them have a sum to release:
one half of a random split is a sample of the cohort as good as the whole but for its size, and the noise in
the mean has at most twice the variance; with less, the step would be more noise than the plan asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from aggregator.clock import Moment
from aggregator.records import LogEntry
from aggregator.rounds import subcohort, subcohort_state
from aggregator.rounds.events import Event, Output, Reconnected, Send, Tick
from aggregator.rounds.report import PHASES, PhaseReport, SubcohortReport
from aggregator.rounds.subcohort_state import SubcohortState, Trust
from protocol.identity import SignedDocument
from protocol.messages import Invitation, RoundEnd
from protocol.plan import Plan
from protocol.secagg import server
from protocol.secagg.server_state import Failed, Recovered


@dataclass(frozen=True)
class RoundState:
    """A round that is running, or has just ended.

    Attributes:
        document: the signed plan, as devices get it.
        subcohorts: by their number in the plan's split.
    """

    plan: Plan
    document: SignedDocument
    subcohorts: tuple[SubcohortState, ...]

    def of(self, device_id: str) -> SubcohortState:
        """The sub-cohort that a device belongs to, if it is invited."""
        return self.subcohorts[self.plan.cohort.split.number_of(device_id, self.document.digest)]

    @property
    def invited(self) -> frozenset[str]:
        """The devices that were selected."""
        return frozenset().union(*(part.invited for part in self.subcohorts))

    @property
    def ended(self) -> bool:
        """Nothing is awaited any more, in any sub-cohort."""
        return all(part.ended for part in self.subcohorts)

    @property
    def answered(self) -> bool:
        """It has ended, and masks are to be made of some sub-cohort's answers: see `recover`."""
        return self.ended and any(part.answered for part in self.subcohorts)

    @property
    def recovered(self) -> tuple[SubcohortState, ...]:
        """The sub-cohorts whose sums can be released, once `recover` has made their masks."""
        return tuple(part for part in self.subcohorts if isinstance(part.secagg, Recovered))

    @property
    def completes(self) -> bool:
        """Whether enough sub-cohorts have a sum to release."""
        return 2 * len(self.recovered) >= len(self.subcohorts)

    @property
    def spent(self) -> tuple[SubcohortState, ...]:
        """The sub-cohorts whose devices were asked to unmask."""
        return tuple(part for part in self.subcohorts if part.released)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Survivors of every sub-cohort that has closed its survivor set and not failed since."""
        return tuple(
            sorted(
                device_id
                for part in self.subcohorts
                if not isinstance(part.secagg, Failed)
                for device_id in part.survivors
            )
        )

    @property
    def liars(self) -> frozenset[str]:
        """The devices that broke the rules for sure."""
        ends = (part.secagg for part in self.subcohorts)
        return frozenset().union(*(end.liars for end in ends if isinstance(end, Recovered | Failed)))

    @property
    def declined(self) -> Mapping[str, str]:
        """Device id -> why it refused the plan or left the round, in its own words."""
        return {device_id: why for part in self.subcohorts for device_id, why in part.declined.items()}

    def phases(self) -> tuple[PhaseReport, ...]:
        """Every phase so far, all sub-cohorts together; one that somebody is in has no end."""
        reports = [report for part in self.subcohorts for report in part.phases()]
        together = ([r for r in reports if r.phase == phase] for phase in PHASES)
        return tuple(PhaseReport.together(parts) for parts in together if parts)

    def reports(self) -> tuple[SubcohortReport, ...]:
        """How it goes in each sub-cohort."""
        return tuple(
            SubcohortReport(
                invited=len(part.invited),
                cohort=0 if part.cohort is None else part.cohort.graph.size,
                survivors=len(part.survivors),
                code=part.secagg.code if isinstance(part.secagg, Failed) else "",
            )
            for part in self.subcohorts
        )


def begin(
    plan: Plan, document: SignedDocument, trust: Trust, invited: Iterable[str], at: Moment
) -> tuple[RoundState, tuple[Output, ...]]:
    """Opens a round for check-in; the selected devices are online and get their invitation."""
    begun = [
        subcohort.begin(number, plan, document, trust, devices, at)
        for number, devices in enumerate(plan.cohort.split.parts(invited, document.digest))
    ]
    outputs = tuple(output for _, asked in begun for output in asked)
    return RoundState(plan, document, tuple(part for part, _ in begun)), outputs


def resume(
    plan: Plan,
    document: SignedDocument,
    trust: Trust,
    invited: Iterable[str],
    log: Iterable[LogEntry],
    started_at: float,
    at: Moment,
) -> RoundState:
    """Restores a round from its log, after a restart. Nobody counts as online until a birth says so."""
    split, began = plan.cohort.split, Moment(at.clock, started_at)
    parts = [
        subcohort_state.opened(number, plan, document, trust, devices, began)
        for number, devices in enumerate(split.parts(invited, document.digest))
    ]
    for entry in log:
        number = (
            entry.subcohort if entry.kind == "closed" else split.number_of(entry.device_id, document.digest)
        )
        parts[number] = subcohort_state.replay(parts[number], entry, Moment(at.clock, entry.at))
    away = (replace(part, offline=dict.fromkeys(part.invited, at.clock)) for part in parts)
    return RoundState(plan, document, tuple(away))


def handle(state: RoundState, event: Event, at: Moment) -> tuple[RoundState, tuple[Output, ...]]:
    """Applies one event.

    Raises:
        IllegalEvent, BadSignature, MalformedMessage: an answer not owed, or not valid; nothing changed.
    """
    concerned = state.subcohorts if isinstance(event, Tick | Reconnected) else (state.of(event.device_id),)
    parts = list(state.subcohorts)
    outputs: list[Output] = []
    for part in concerned:
        parts[part.number], wanted = subcohort.handle(part, event, at)
        outputs += wanted
    changed = any(part is not before for part, before in zip(parts, state.subcohorts, strict=True))
    after = replace(state, subcohorts=tuple(parts)) if changed else state
    return after, (*outputs, *_dismissed(state, after))


def recover(state: RoundState) -> RoundState:
    """Makes masks of the answers, in every sub-cohort that has them."""
    return replace(state, subcohorts=tuple(map(subcohort_state.recover, state.subcohorts)))


def _dismissed(before: RoundState, state: RoundState) -> tuple[Send, ...]:
    """Tells the devices of sub-cohorts that have just failed, where others go on."""
    if state.ended:
        return ()
    return tuple(
        Send(
            device_id,
            RoundEnd(round_id=state.plan.round_id, completed=False, reason=part.secagg.code),
        )
        for was, part in zip(before.subcohorts, state.subcohorts, strict=True)
        if isinstance(part.secagg, Failed) and not was.ended
        for device_id in sorted(part.invited)
    )


def request(state: RoundState, device_id: str) -> server.Request | Invitation | None:
    """What the current phase asks of a device."""
    return subcohort.request(state.of(device_id), device_id)


def expects(state: RoundState, device_id: str) -> bool:
    """Whether a device still has a part in the round; one that has not may forget it."""
    return subcohort_state.expects(state.of(device_id), device_id)


def why_declined(state: RoundState) -> str:
    """How many devices declined, and what one of the most said: what an operator has to know of a failure."""
    declined = {device_id: why for device_id, why in state.declined.items() if why != subcohort_state.FULL}
    if not declined:
        return ""
    codes = Counter(why.partition(":")[0] for why in declined.values())
    common = codes.most_common(1)[0][0]
    said = next(why for _, why in sorted(declined.items()) if why.partition(":")[0] == common)
    return f"{len(declined)} declined, {codes[common]} of them: {said}"
