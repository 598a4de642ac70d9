"""One sub-cohort as the aggregator runs it: the secure-aggregation server, with deadlines and repeats.

Theory of operation. `protocol.secagg.server` knows what an answer means; this machine knows when a phase is
over and who must be asked (again). Both are pure: `handle(state, event, at)` returns the new state and what
to do, in order: first make log entries durable, then send.

    over      = nobody is awaited, or the roster is full
                or the deadline of the phase has passed, or the plan has expired
                or every device that is awaited has been offline for the grace time, and it can go on
    asked     = when the phase opens, when the device comes online, and again and again until it answers,
                at growing intervals

End. When everybody has answered the request to unmask, nothing is awaited any more, but the masks are not
known yet: `recover` makes them of the answers, which takes long enough to be done elsewhere. It is a function
of the state, so that nothing of it is logged.

Restart. The log entries are the sub-cohort: `resume` replays them and arrives at the same state, except for
who is online, which births will tell. Requests follow from the state, so nothing else needs to be stored. A
phase that a restart interrupts gets its whole time again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from aggregator.clock import Moment
from aggregator.records import LogEntry
from aggregator.rounds.events import (
    DeviceHeard,
    DeviceOffline,
    DeviceOnline,
    Event,
    Log,
    MaskedInputStored,
    MessageReceived,
    Output,
    Reconnected,
    Send,
    Tick,
)
from aggregator.rounds.report import Phase, PhaseReport
from protocol.codec import decode_from_device, encode
from protocol.errors import IllegalEvent
from protocol.identity import SignedDocument
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    ClientAbort,
    DeviceStatus,
    Invitation,
    Refusal,
    RenewalRequest,
    RoundEnd,
    UpdateReady,
    UploadOffer,
)
from protocol.plan import Deadlines, Plan
from protocol.secagg import server
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.closing import can_close
from protocol.secagg.server import ClientMessage
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
REPEAT_SECONDS = 2.0
REPEAT_GROWTH = 1.5
REPEAT_LIMIT = 15.0


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
            phase=_PHASES[type(self.secagg)],
            started=self.opened.unix,
            expected=len(self.owed),
            answered=len(self.owed - missing),
        )
        return (*self.closed, current)


_PHASES: dict[type, Phase] = {
    Advertising: "AdvertiseKeys",
    Sharing: "ShareKeys",
    Collecting: "MaskedInput",
    Checking: "ConsistencyCheck",
    Unmasking: "Unmasking",
}


def begin(
    number: int, plan: Plan, document: SignedDocument, trust: Trust, invited: Iterable[str], at: Moment
) -> tuple[SubcohortState, tuple[Output, ...]]:
    """Opens a sub-cohort for check-in; its devices are online and get their invitation."""
    state = opened(number, plan, document, trust, invited, at)
    return _ask(state, state.owed, at)


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


# --- the log ---------------------------------------------------------------------------------------------


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
    surplus = frozenset(missing) if _full(state) else frozenset[str]()
    missing = frozenset(missing) - surplus
    report = PhaseReport(
        phase=_PHASES[type(before)],
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


# --- the machine -----------------------------------------------------------------------------------------


def handle(state: SubcohortState, event: Event, at: Moment) -> tuple[SubcohortState, tuple[Output, ...]]:
    """Applies one event.

    Raises:
        IllegalEvent, BadSignature, MalformedMessage: an answer not owed, or not valid; nothing changed.
    """
    outputs: tuple[Output, ...] = ()
    match event:
        case MessageReceived():
            state, outputs = _receive(state, event, at)
        case MaskedInputStored():
            entry = LogEntry(at.unix, "stored", event.device_id)
            state, outputs = _without(replay(state, entry, at), event.device_id), (Log(entry),)
        case DeviceOnline():
            offline = {d: since for d, since in state.offline.items() if d != event.device_id}
            state, outputs = _ask(replace(state, offline=offline), {event.device_id}, at)
        case DeviceOffline():
            if event.device_id in state.invited and event.device_id not in state.offline:
                state = replace(state, offline={**state.offline, event.device_id: at.clock})
            state = _without(state, event.device_id)
        case DeviceHeard():
            repeat = state.repeats.get(event.device_id)
            if repeat is not None:
                later = Repeat(at.clock + repeat.interval, repeat.interval)
                state = replace(state, repeats={**state.repeats, event.device_id: later})
        case Reconnected():
            opened = replace(state.opened, clock=state.opened.clock + event.outage)
            state = replace(state, opened=opened, offline=dict.fromkeys(state.invited, at.clock), repeats={})
            return state, ()
        case Tick():
            due = {device_id for device_id, repeat in state.repeats.items() if repeat.at <= at.clock}
            state, outputs = _ask(state, due, at)
        case _:
            assert_never(event)
    return _advance(state, outputs, at)


def request(state: SubcohortState, device_id: str) -> server.Request | Invitation | None:
    """What the current phase asks of a device."""
    if isinstance(state.secagg, Advertising):
        return Invitation(plan=state.document)
    if state.ended:
        return None
    return server.request(state.secagg, device_id)


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


def phase_seconds(limits: Deadlines, phase: Phase) -> float:
    """How long a phase lasts at most."""
    return {
        "AdvertiseKeys": limits.advertise_keys,
        "ShareKeys": limits.share_keys,
        "MaskedInput": limits.masked_input,
        "ConsistencyCheck": limits.consistency_check,
        "Unmasking": limits.unmasking,
    }[phase]


def _receive(
    state: SubcohortState, event: MessageReceived, at: Moment
) -> tuple[SubcohortState, tuple[Output, ...]]:
    entry = LogEntry(at.unix, "received", event.device_id, encode(event.message))
    after = replay(state, entry, at)
    if after.secagg is state.secagg or _left_before(state.secagg, after.secagg, event.message):
        return state, ()
    return _without(after, event.device_id), (Log(entry),)


def _left_before(before: ServerState, after: ServerState, message: ClientMessage) -> bool:
    if not isinstance(message, Refusal | ClientAbort) or isinstance(before, Recovered | Failed):
        return False
    return not isinstance(after, Recovered | Failed) and before.left == after.left


def _without(state: SubcohortState, device_id: str) -> SubcohortState:
    """Stops asking a device."""
    if device_id not in state.repeats:
        return state
    return replace(state, repeats={d: repeat for d, repeat in state.repeats.items() if d != device_id})


def _ask(
    state: SubcohortState, devices: Iterable[str], at: Moment
) -> tuple[SubcohortState, tuple[Output, ...]]:
    """Sends the current request to those of the devices that are awaited and online."""
    wanted = sorted(state.awaited.intersection(devices) - state.offline.keys())
    repeats, outputs = dict(state.repeats), []
    for device_id in wanted:
        message = request(state, device_id)
        if message is None:
            continue
        outputs.append(Send(device_id, message))
        last = repeats.get(device_id)
        interval = REPEAT_SECONDS if last is None else min(last.interval * REPEAT_GROWTH, REPEAT_LIMIT)
        repeats[device_id] = Repeat(at.clock + interval, interval)
    return (replace(state, repeats=repeats), tuple(outputs)) if outputs else (state, ())


def _advance(
    state: SubcohortState, outputs: tuple[Output, ...], at: Moment
) -> tuple[SubcohortState, tuple[Output, ...]]:
    """Closes every phase that is over."""
    while not state.ended and _over(state, at):
        entry, before = LogEntry.closing(at.unix, state.number), state
        state = replay(state, entry, at)
        state, asked = _ask(state, state.owed, at)
        surplus = state.declined.keys() - before.declined.keys()
        end = RoundEnd(round_id=state.plan.round_id, completed=False, reason=FULL)
        asked = (*asked, *(Send(device_id, end) for device_id in sorted(surplus)))
        # What the closed phase still wanted to ask is stale.
        outputs = (*(output for output in outputs if isinstance(output, Log)), Log(entry), *asked)
    return state, outputs


def _full(state: SubcohortState) -> bool:
    """Whether as many devices have checked in as the plan has places for; more may have been invited."""
    return (
        isinstance(state.secagg, Advertising) and len(state.secagg.entries) >= state.plan.cohort.split.largest
    )


def _over(state: SubcohortState, at: Moment) -> bool:
    if _full(state):
        return True
    limits, pending = state.plan.deadlines, server.pending(state.secagg)
    seconds = phase_seconds(limits, _PHASES[type(state.secagg)])
    if not pending or at.clock - state.opened.clock >= seconds or at.unix >= state.plan.expires_at:
        return True
    gone = at.clock - limits.offline_grace
    if len(state.offline) < pending or not all(
        state.offline.get(device_id, at.clock + 1) <= gone for device_id in state.awaited
    ):
        return False
    # Too few are left: those who are away get the whole time of the phase to come back.
    return can_close(state.secagg)
