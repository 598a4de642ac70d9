"""One sub-cohort as the aggregator runs it: the secure-aggregation server, with deadlines and repeats.

Theory of operation. `protocol.secagg.server` knows what an answer means; this machine knows when a phase is
over and who must be asked (again). Both are pure: `handle(state, event, at)` returns the new state and what
to do, in order: first make log entries durable, then send.

    over      = nobody is awaited, or the roster is full
                or the deadline of the phase has passed, or the plan has expired
                or every device that is awaited has been offline for the grace time, and it can go on
    asked     = when the phase opens, when the device comes online, and again and again until it answers,
                at growing intervals

Restart. The log entries are the sub-cohort (`aggregator.rounds.subcohort_state`): births tell who is online,
and requests follow from the state, so nothing else needs to be stored. A phase that a restart interrupts gets
its whole time again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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
from aggregator.rounds.report import Phase
from aggregator.rounds.subcohort_state import (
    FULL,
    PHASES,
    Repeat,
    SubcohortState,
    Trust,
    full,
    opened,
    replay,
)
from protocol.codec import encode
from protocol.identity import SignedDocument
from protocol.messages import ClientAbort, Invitation, Refusal, RoundEnd
from protocol.plan import Deadlines, Plan
from protocol.secagg import server
from protocol.secagg.closing import can_close
from protocol.secagg.server import ClientMessage
from protocol.secagg.server_state import Advertising, Failed, Recovered, ServerState

REPEAT_SECONDS = 2.0
REPEAT_GROWTH = 1.5
REPEAT_LIMIT = 15.0


def begin(
    number: int, plan: Plan, document: SignedDocument, trust: Trust, invited: Iterable[str], at: Moment
) -> tuple[SubcohortState, tuple[Output, ...]]:
    """Opens a sub-cohort for check-in; its devices are online and get their invitation."""
    state = opened(number, plan, document, trust, invited, at)
    return _ask(state, state.owed, at)


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


def _over(state: SubcohortState, at: Moment) -> bool:
    if full(state):
        return True
    limits, pending = state.plan.deadlines, server.pending(state.secagg)
    seconds = phase_seconds(limits, PHASES[type(state.secagg)])
    if not pending or at.clock - state.opened.clock >= seconds or at.unix >= state.plan.expires_at:
        return True
    gone = at.clock - limits.offline_grace
    if len(state.offline) < pending or not all(
        state.offline.get(device_id, at.clock + 1) <= gone for device_id in state.awaited
    ):
        return False
    # Too few are left: those who are away get the whole time of the phase to come back.
    return can_close(state.secagg)
