"""One sub-cohort as its log tells it: the state, and the one way in which it moves on.

`replay` of every log entry, from `opened` on, arrives at the same state again, except for who is online and
who has been asked.

End. When everybody has answered the request to unmask, nothing is awaited any more, but the masks are not
known yet: `recover` makes them of the answers, which takes long enough to be done elsewhere. It is a function
of the state, so that nothing of it is logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from aggregator.clock import Moment
from aggregator.records import LogEntry
from aggregator.rounds.report import Phase, PhaseReport
from protocol.codec import decode_from_device
from protocol.errors import IllegalEvent
from protocol.identity import SignedDocument
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    ClientAbort,
    DeviceStatus,
    Refusal,
    RenewalRequest,
    UpdateReady,
    UploadOffer,
)
from protocol.plan import Plan
from protocol.secagg import server
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.server_state import (
    Advertising,
    Checking,
    Cohort,
    Collecting,
    Failed,
    Recovered,
    ServerContext,
    ServerState,
    Sharing,
    Unmasking,
)

FULL = "cohort-full"
"""What a device that is sent away because the roster was full has in place of words of its own."""


@dataclass(frozen=True)
class Trust:
    """Whose certificates count, and which of them have been verified: the same for all rounds of a
    service."""

    ca: bytes
    certificates: CertificateCache = field(default_factory=CertificateCache, repr=False, compare=False)


@dataclass(frozen=True)
class Repeat:
    """When a device is asked again (on the monotonic clock), and how long after that once more."""

    at: float
    interval: float


@dataclass(frozen=True)
class SubcohortState:
    """A sub-cohort whose round is running, or has just ended for it: it is `answered`, Recovered or Failed.

    Attributes:
        number: of the sub-cohort in the plan's split.
        document: the signed plan, as devices get it.
        opened: when the current phase began.
        owed: who owed an answer when it began.
        closed: the phases before it.
        cohort: the roster, once it is closed.
        survivors_hash: what survivors sign, once their set is closed.
        survivors: their device ids.
        declined: device id -> why it refused the plan or left the round, in its own words.
        offline: device id -> since when (monotonic clock).
        repeats: who has been asked and not answered.
    """

    number: int
    plan: Plan
    document: SignedDocument
    secagg: ServerState
    opened: Moment
    owed: frozenset[str]
    closed: tuple[PhaseReport, ...] = ()
    cohort: Cohort | None = None
    survivors_hash: bytes | None = None
    survivors: tuple[str, ...] = ()
    declined: Mapping[str, str] = field(default_factory=dict)
    offline: Mapping[str, float] = field(default_factory=dict)
    repeats: Mapping[str, Repeat] = field(default_factory=dict)

    @property
    def invited(self) -> frozenset[str]:
        """The devices that were selected."""
        return self.secagg.context.invited

    @property
    def answered(self) -> bool:
        """The last phase is over, and nobody has made masks of the answers yet."""
        return isinstance(self.secagg, Unmasking) and self.closed[-1].phase == "Unmasking"

    @property
    def ended(self) -> bool:
        """Nothing is awaited any more: the sum's masks follow from the answers, or the sub-cohort failed."""
        return self.answered or isinstance(self.secagg, Recovered | Failed)

    @property
    def awaited(self) -> frozenset[str]:
        """The devices whose answer the current phase still waits for."""
        return frozenset() if self.ended else server.awaited(self.secagg)

    @property
    def released(self) -> bool:
        """Whether devices were asked to unmask: from here on the privacy of a sum is spent."""
        return any(phase.phase == "Unmasking" for phase in self.closed) or isinstance(self.secagg, Unmasking)

    def phases(self) -> tuple[PhaseReport, ...]:
        """Every phase so far; the current one without an end."""
        if self.ended:
            return self.closed
        missing = self.awaited
        current = PhaseReport(
            phase=PHASES[type(self.secagg)],
            started=self.opened.unix,
            expected=len(self.owed),
            answered=len(self.owed - missing),
        )
        return (*self.closed, current)


PHASES: dict[type, Phase] = {
    Advertising: "AdvertiseKeys",
    Sharing: "ShareKeys",
    Collecting: "MaskedInput",
    Checking: "ConsistencyCheck",
    Unmasking: "Unmasking",
}


def opened(
    number: int, plan: Plan, document: SignedDocument, trust: Trust, invited: Iterable[str], at: Moment
) -> SubcohortState:
    """The state that the log of a sub-cohort begins with."""
    context = ServerContext(
        fleet=plan.fleet,
        round_id=plan.round_id,
        plan_hash=document.digest,
        ca=trust.ca,
        invited=frozenset(invited),
        minimum_cohort=plan.cohort.minimum,
        minimum_survivors=plan.cohort.minimum_survivors,
        graph=plan.cohort.graph,
        split=plan.cohort.split,
        certificates=trust.certificates,
    )
    return SubcohortState(number, plan, document, server.begin(context), at, context.invited)


def replay(state: SubcohortState, entry: LogEntry, at: Moment) -> SubcohortState:
    """Applies one entry of the log: the one way in which a sub-cohort moves on."""
    if state.ended:
        raise IllegalEvent("the round is over")
    if entry.kind == "closed":
        return _close(state, at)
    if entry.kind == "stored":
        return replace(state, secagg=server.handle(state.secagg, server.InputStored(entry.device_id)))
    message, _ = decode_from_device(entry.frame)
    if isinstance(message, DeviceStatus | UploadOffer | UpdateReady | RenewalRequest | BlobNeed | BlobChunk):
        raise IllegalEvent(f"a {message.type} in the log of a round")
    received = server.Received(entry.device_id, message, int(entry.at))
    state = replace(state, secagg=server.handle(state.secagg, received))
    if isinstance(message, Refusal | ClientAbort):
        why = f"{message.code}: {message.detail}" if message.detail else message.code
        # A device's own words end in terminals: no control characters.
        printable = "".join(character if character.isprintable() else " " for character in why)
        state = replace(state, declined={**state.declined, entry.device_id: printable})
    return state


def _close(state: SubcohortState, at: Moment) -> SubcohortState:
    before, missing = state.secagg, state.awaited
    # The last phase closes for nothing but its answers: see `recover`.
    secagg = before if isinstance(before, Unmasking) else server.handle(before, server.ClosePhase())
    # Whoever left in an earlier phase is not asked again, so it is a dropout of that phase only.
    left = {d for d in state.owed if not expects(state, d)}
    surplus = frozenset(missing) if full(state) else frozenset[str]()
    missing = frozenset(missing) - surplus
    report = PhaseReport(
        phase=PHASES[type(before)],
        started=state.opened.unix,
        ended=at.unix,
        expected=len(state.owed - surplus),
        answered=len(state.owed - surplus - missing - left),
        dropped=tuple(sorted(missing | left)),
    )
    state = replace(
        state,
        secagg=secagg,
        opened=at,
        owed=frozenset() if secagg is before else server.awaited(secagg),
        closed=(*state.closed, report),
        repeats={},
        declined={**state.declined, **dict.fromkeys(surplus, FULL)},
    )
    if isinstance(secagg, Sharing):
        return replace(state, cohort=secagg.cohort)
    if isinstance(secagg, Checking):
        survivors = tuple(secagg.cohort.members[index].device_id for index in sorted(secagg.survivors))
        return replace(state, survivors_hash=secagg.survivors_hash, survivors=survivors)
    return state


def recover(state: SubcohortState) -> SubcohortState:
    """Makes masks of the answers, where they have come: it takes seconds for a thousand clients."""
    if not state.answered:
        return state
    return replace(state, secagg=server.handle(state.secagg, server.ClosePhase()))


def expects(state: SubcohortState, device_id: str) -> bool:
    """Whether a device still has a part in the round; one that has not may forget it."""
    secagg = state.secagg
    if state.ended or isinstance(secagg, Recovered | Failed):
        return False
    if isinstance(secagg, Advertising):
        return device_id in state.invited and device_id not in secagg.left
    index = secagg.cohort.index.get(device_id)
    if index is None or index in secagg.left:
        return False
    if isinstance(secagg, Sharing):
        return True
    if isinstance(secagg, Collecting):
        return index in secagg.sharers
    return index in (secagg.survivors if isinstance(secagg, Checking) else secagg.signatures)


def full(state: SubcohortState) -> bool:
    """Whether as many devices have checked in as the plan has places for; more may have been invited."""
    return (
        isinstance(state.secagg, Advertising) and len(state.secagg.entries) >= state.plan.cohort.split.largest
    )
