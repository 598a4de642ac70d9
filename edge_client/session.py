"""The device: which models it has, which round it is in, and what it answers to whom.

Pure: `handle(profile, state, event, stamp)` returns the next state and what to do, and touches nothing. The
rooms behind it are `edge_client.models` (versions), `edge_client.session_plans` (what it is asked to join),
`edge_client.participation` and `edge_client.round_work` (the active round); here stands who gets which event.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from edge_client import (
    active_round,
    client_updates,
    models,
    participation,
    preparation,
    round_work,
    standing,
)
from edge_client.events import (
    BlobFound,
    ClientSeen,
    ConditionsChanged,
    Connected,
    Evaluated,
    Event,
    Fault,
    FieldRead,
    FieldsDeclared,
    InputWritten,
    MessageReceived,
    Personalised,
    PreparationFailed,
    Stamp,
    Started,
    Ticked,
    TrainingFinished,
    UpdatePrepared,
    UpdateRead,
    VersionFailed,
    VersionTested,
    WorkFailed,
)
from edge_client.outputs import NOTHING, Announce, Note, Outputs, Personalise, Send, note, warning
from edge_client.participation import RoundRequest
from edge_client.personalisation import PersonalConfig
from edge_client.policy import DevicePolicy
from edge_client.profile import Profile
from edge_client.session_client import client_arrived, client_found, client_seen, client_ticked, client_told
from edge_client.session_plans import invited, not_prepared, order_ended, ordered, prepare, ready
from edge_client.session_state import (
    UNUSABLE,
    Result,
    SessionState,
    adopt,
    advance,
    collected_order,
    distrust,
    keep,
    with_library,
)
from models.assignment import Answering, Evaluating, Training
from models.manifest import InvalidManifest
from protocol.errors import BadSignature, MalformedMessage
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    ClientAbort,
    Invitation,
    ModelAnnouncement,
    RenewalAnswer,
    Roster,
    RoundEnd,
    ShareDelivery,
    SurvivorSet,
    TrainingOrder,
    UnmaskRequest,
    UploadReceipt,
)


def handle(profile: Profile, state: SessionState, event: Event, stamp: Stamp) -> Result:
    """Applies one event; returns the new state and what to do, in order."""
    if isinstance(event, MessageReceived):
        return _message(profile, state, event, stamp)
    if isinstance(event, ConditionsChanged):
        fit_again = state.unfit is not None and event.fault is None
        state = replace(state, unfit=event.fault)
        return state, ready(state) if fit_again else ()
    if isinstance(event, FieldsDeclared):
        return replace(state, fields=event.fields), ()
    if isinstance(event, Started):
        state, working = advance(state, stamp)
        return state, (keep(state), *models.resume(state.library), *working)
    if isinstance(event, Connected):
        state, pulling = client_ticked(state, stamp, hurry=True)
        state, outputs = _connected(state, stamp)
        return state, (*pulling, *outputs)
    if isinstance(event, Ticked):
        state, pulling = client_ticked(state, stamp)
        state, outputs = _ticked(profile, state, stamp)
        return state, (*pulling, *outputs)
    if isinstance(event, BlobFound):
        library, outputs = models.blob_found(state.library, event, stamp)
        state, more = client_found(replace(state, library=library), event, stamp)
        return state, (*outputs, *more)
    if isinstance(event, ClientSeen):
        return client_seen(state, event, stamp)
    if isinstance(event, VersionTested):
        return _tested(state, event, stamp)
    if isinstance(event, VersionFailed):
        return _failed_in_use(state, event, stamp)
    if isinstance(event, Personalised):
        state, outputs = _unless_unusable(state, event, stamp)
        return state, (_personalised(event), *outputs)
    if isinstance(event, UpdatePrepared):
        orders, library, outputs = preparation.prepared(state.orders, state.library, event, stamp)
        known, state = state.library, replace(state, orders=orders, library=library)
        said = ready(state, event.model) if library is not known else NOTHING
        return state, (*outputs, *said, keep(state))
    if isinstance(event, PreparationFailed):
        return not_prepared(state, event, stamp)
    if isinstance(event, TrainingFinished | UpdateRead | Evaluated | FieldRead | InputWritten | WorkFailed):
        return _worked(state, event, stamp)
    assert_never(event)


# --- messages --------------------------------------------------------------------------------------------


def _message(profile: Profile, state: SessionState, event: MessageReceived, stamp: Stamp) -> Result:
    message = event.message
    if isinstance(message, Invitation):
        return invited(profile, state, message, stamp)
    if isinstance(message, TrainingOrder):
        return ordered(profile, state, message, stamp)
    if isinstance(message, ModelAnnouncement):
        return _announced(profile, state, message, stamp)
    if isinstance(message, RenewalAnswer):
        return state, ()  # no matter of rounds
    if isinstance(message, BlobChunk):
        library, outputs = models.chunk_received(state.library, message, event.body, stamp)
        if not outputs:
            return client_arrived(state, message, event.body, stamp)
        return replace(state, library=library), outputs
    if isinstance(message, BlobNeed):
        if state.active is None:
            return state, ()
        return adopt(state, participation.chunks_needed(state.active, message, stamp))
    if state.active is None or message.round_id != state.active.round_id:
        if isinstance(message, RoundEnd) and not message.completed:
            return order_ended(state, message)
        return _other_round(state, message)
    if isinstance(message, UploadReceipt):
        return adopt(state, participation.receipt_received(state.active, message, stamp))
    if isinstance(message, RoundEnd):
        # Nobody signs it, and it goes to the log and to the owner's terminal.
        reason = "".join(filter(str.isprintable, message.reason)) or "no reason given"
        outcome = "completed" if message.completed else f"ended: {reason}"
        return adopt(state, active_round.close(state.active, outcome, stamp))
    step = participation.request_received(state.active, profile, state.library, message, stamp)
    return adopt(state, step)


def _other_round(state: SessionState, message: RoundRequest | UploadReceipt | RoundEnd) -> Result:
    """A message of a round that this device is not in: only a request deserves an answer."""
    if not isinstance(message, Roster | ShareDelivery | SurvivorSet | UnmaskRequest):
        return state, ()
    detail = "this device left the round" if message.round_id in state.used else "it never joined the round"
    answer = ClientAbort(round_id=message.round_id, code="not-in-round", detail=detail)
    return state, (note("request-of-other-round", round=message.round_id, detail=detail), Send(answer))


def _announced(profile: Profile, state: SessionState, message: ModelAnnouncement, stamp: Stamp) -> Result:
    try:
        if (client := client_updates.verified(profile, message)) is not None:
            return client_told(state, client, stamp)
        told = standing.verified(profile, message)
    except (BadSignature, InvalidManifest, MalformedMessage) as error:
        return state, (warning("announcement-refused", reason=str(error)),)
    if not profile.follows(told.assignment.model):
        return state, ()
    library, outputs = standing.assigned(state.library, told, stamp)
    return with_library(state, library, outputs, stamp)


# --- time, and this device's own work ----------------------------------------------------------------------


def _connected(state: SessionState, stamp: Stamp) -> Result:
    library, fetching = models.ticked(state.library, stamp, hurry=True)
    state = replace(state, library=library)
    # Said again in case it was lost: the aggregator takes each answer once, and ends what it has ended.
    answer = active_round.answer_of(state.active) if state.active else None
    said: Outputs = (Send(answer),) if answer else ()
    said += ready(state)
    return state, (Announce(library.serving(), library.failures()), *fetching, *said)


def _ticked(profile: Profile, state: SessionState, stamp: Stamp) -> Result:
    library, fetching = models.ticked(state.library, stamp)
    active = state.active
    if active is None:
        orders, library, expired = preparation.ticked(state.orders, library, stamp)
        state, preparing = prepare(replace(state, library=library, orders=orders), stamp)
        state, personalising = _personalise(profile.policy, state)
        return state, (*fetching, *expired, *preparing, *personalising)
    state = replace(state, library=library)
    state, offering = adopt(state, participation.tick(active, stamp))
    return state, (*fetching, *offering)


def _personalise(policy: DevicePolicy, state: SessionState) -> Result:
    """Starts to fine-tune one version that was not yet, if the owner wants that and nothing else is to do."""
    if not policy.personal_epochs or state.busy or state.orders or state.unfit is not None:
        return state, ()
    newest = (shelf.good[-1] for shelf in state.library.shelves.values() if shelf.good)
    version = next((version for version in newest if version.sha256 not in state.personalised), None)
    if version is None:
        return state, ()
    config = PersonalConfig(policy.personal_epochs, policy.personal_learning_rate)
    job = Personalise(version.manifest, config, state.library.local(version.manifest))
    return replace(state, personalised=state.personalised | {version.sha256}), (job,)


def _personalised(event: Personalised) -> Note:
    if isinstance(event.result, Fault):
        return warning(
            "not-personalised", model=event.model, code=event.result.code, reason=event.result.detail
        )
    record = event.result
    return note(
        "personalised",
        model=record.model,
        version=record.version,
        kept=record.kept,
        global_accuracy=round(record.global_accuracy, 4),
        personal_accuracy=round(record.personal_accuracy, 4),
    )


def _tested(state: SessionState, event: VersionTested, stamp: Stamp) -> Result:
    library, outputs = models.tested(state.library, event, stamp)
    return with_library(state, library, outputs, stamp)


def _failed_in_use(state: SessionState, event: VersionFailed, stamp: Stamp) -> Result:
    """A version failed, or its process crashed: a round that would run it again is left first."""
    active, left = state.active, NOTHING
    about = None if active is None or isinstance(active.assignment, Answering) else active.assignment.manifest
    if active is not None and about is not None and active.upload is None and about.sha256() == event.sha256:
        state, left = adopt(state, active_round.abort(active, event.fault, stamp))
    state, outputs = distrust(state, event.sha256, event.fault, stamp)
    return state, (*left, *outputs)


def _unless_unusable(state: SessionState, event: Personalised, stamp: Stamp) -> Result:
    """The state after fine-tuning; a version that does not run gives way to the one before."""
    if isinstance(event.result, Fault) and event.result.code == UNUSABLE:
        return distrust(state, event.sha256, event.result, stamp)
    return state, ()


def _worked(
    state: SessionState,
    event: TrainingFinished | UpdateRead | Evaluated | FieldRead | InputWritten | WorkFailed,
    stamp: Stamp,
) -> Result:
    active = state.active
    if active is None or active.round_id != event.round_id:
        # The round ended while the worker was busy with it.
        return state, ()
    if isinstance(event, TrainingFinished):
        return adopt(state, round_work.trained(active, state.library, event.update, stamp))
    if isinstance(event, UpdateRead):
        return adopt(state, round_work.update_read(active, state.library, event.contribution, stamp))
    if isinstance(event, Evaluated):
        return adopt(state, round_work.evaluated(active, state.library, event.evaluation, stamp))
    if isinstance(event, FieldRead):
        return adopt(state, round_work.field_read(active, state.library, event.value, stamp))
    if isinstance(event, InputWritten):
        return adopt(state, round_work.input_written(active, event.blob, event.local, stamp))
    collected = collected_order(state)
    state, outputs = adopt(state, active_round.abort(active, event.fault, stamp))
    model = next((m for m, update in state.library.pending.items() if update.order == collected), None)
    if model is not None and not event.fault.transient:
        # It would fail in the next buffer, too.
        library, told = preparation.dropped(state.library, model, event.fault.code)
        state, outputs = replace(state, library=library), (*outputs, *told)
    if event.fault.code != UNUSABLE or not isinstance(active.assignment, Training | Evaluating):
        return state, outputs
    state, more = distrust(state, active.assignment.task.manifest_sha256, event.fault, stamp)
    return state, (*outputs, *more)
