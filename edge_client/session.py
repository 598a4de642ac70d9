"""The device: which models it has, which round it is in, and what it answers to whom.

Pure: `handle(profile, state, event, stamp)` returns the next state and what to do, and touches nothing. The
rooms behind it are `edge_client.models` (versions), `edge_client.invitation` (what it agrees to) and
`edge_client.participation` (the active round); here stands who gets which event.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import assert_never

from edge_client import models, participation, preparation, standing
from edge_client.durable import DropPending, PendingUpdate, RoundRecord, SaveContribution, SaveLocal
from edge_client.events import (
    BlobFound,
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
from edge_client.invitation import (
    MAX_DETAIL,
    Accepted,
    Contradicted,
    Desk,
    Refused,
    Repeated,
    Waiting,
    consider,
    consider_order,
)
from edge_client.ledger import DAY, DaySpent, History
from edge_client.library import Library, StoredStanding, StoredVersion, Version
from edge_client.library import restore as restore_library
from edge_client.outputs import Announce, KeepBlobs, Note, Outputs, Personalise, Send, note, warning
from edge_client.participation import ActiveRound, RoundRequest, Step
from edge_client.personalisation import PersonalConfig
from edge_client.policy import DevicePolicy
from edge_client.preparation import Order, Orders
from edge_client.profile import Profile
from models.assignment import Answering, Evaluating, Training
from models.manifest import InvalidManifest
from protocol.errors import BadSignature, MalformedMessage
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    ClientAbort,
    Invitation,
    ModelAnnouncement,
    Refusal,
    RenewalAnswer,
    Roster,
    RoundEnd,
    ShareDelivery,
    SurvivorSet,
    TrainingOrder,
    UnmaskRequest,
    UploadReceipt,
)
from protocol.secagg.client_state import Advertised
from protocol.token_bucket import TokenBucket

_NOTHING: Outputs = ()
UNUSABLE = "model-unusable"
"""Code of faults that are the version's, not the data's or the device's."""


@dataclass(frozen=True)
class SessionState:
    """All that the device's core knows.

    Attributes:
        library: its models.
        active: the round it is in.
        used: ids of every round it ever joined; none is joined twice.
        joined_at: when it joined those of the last day, seconds since 1970.
        history: what it contributed.
        unfit: why it cannot train right now.
        fields: that queries may ask for.
        personalised: digests of the versions that were fine-tuned here, or are being.
        orders: standing orders whose updates are not ready yet.
    """

    library: Library = field(default_factory=Library)
    active: ActiveRound | None = None
    used: frozenset[str] = frozenset()
    joined_at: tuple[int, ...] = ()
    history: History = field(default_factory=History)
    unfit: Fault | None = None
    fields: frozenset[str] = frozenset()
    personalised: frozenset[str] = frozenset()
    orders: Orders = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether something is under way that time moves on."""
        return self.active is not None or any(shelf.candidate for shelf in self.library.shelves.values())


@dataclass(frozen=True)
class Memory:
    """What an earlier process left on disk."""

    versions: tuple[StoredVersion, ...] = ()
    standings: tuple[StoredStanding, ...] = ()
    local: tuple[SaveLocal, ...] = ()
    pending: tuple[PendingUpdate, ...] = ()
    active: RoundRecord | None = None
    used: frozenset[str] = frozenset()
    joined_at: tuple[int, ...] = ()
    contributed_at: tuple[int, ...] = ()
    spent: tuple[DaySpent, ...] = ()
    personalised: frozenset[str] = frozenset()


Result = tuple[SessionState, Outputs]


def restore(memory: Memory, download: TokenBucket | None = None) -> SessionState:
    """The state that follows from what is on disk; the event `Started` takes it up.

    Args:
        download: bytes that may be downloaded, by the steady clock; no limit when None.
    """
    library = restore_library(memory.versions, memory.local, memory.standings, memory.pending)
    return SessionState(
        library=replace(library, download=download),
        active=participation.restore(memory.active) if memory.active else None,
        used=memory.used,
        joined_at=memory.joined_at,
        history=History(memory.contributed_at, memory.spent),
        personalised=memory.personalised,
    )


def handle(profile: Profile, state: SessionState, event: Event, stamp: Stamp) -> Result:
    """Applies one event; returns the new state and what to do, in order."""
    if isinstance(event, MessageReceived):
        return _message(profile, state, event, stamp)
    if isinstance(event, ConditionsChanged):
        fit_again = state.unfit is not None and event.fault is None
        state = replace(state, unfit=event.fault)
        return state, _ready(state) if fit_again else ()
    if isinstance(event, FieldsDeclared):
        return replace(state, fields=event.fields), ()
    if isinstance(event, Started):
        state, working = _advance(state, stamp)
        return state, (_keep(state), *models.resume(state.library), *working)
    if isinstance(event, Connected):
        return _connected(state, stamp)
    if isinstance(event, Ticked):
        return _ticked(profile, state, stamp)
    if isinstance(event, BlobFound):
        library, outputs = models.blob_found(state.library, event, stamp)
        return replace(state, library=library), outputs
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
        said = _ready(state, event.model) if library is not known else _NOTHING
        return state, (*outputs, *said, _keep(state))
    if isinstance(event, PreparationFailed):
        return _not_prepared(state, event, stamp)
    if isinstance(event, TrainingFinished | UpdateRead | Evaluated | FieldRead | InputWritten | WorkFailed):
        return _worked(state, event, stamp)
    assert_never(event)


# --- messages --------------------------------------------------------------------------------------------


def _message(profile: Profile, state: SessionState, event: MessageReceived, stamp: Stamp) -> Result:
    message = event.message
    if isinstance(message, Invitation):
        return _invited(profile, state, message, stamp)
    if isinstance(message, TrainingOrder):
        return _ordered(profile, state, message, stamp)
    if isinstance(message, ModelAnnouncement):
        return _announced(profile, state, message, stamp)
    if isinstance(message, RenewalAnswer):
        return state, ()  # no matter of rounds
    if isinstance(message, BlobChunk):
        library, outputs = models.chunk_received(state.library, message, event.body, stamp)
        return replace(state, library=library), outputs
    if isinstance(message, BlobNeed):
        if state.active is None:
            return state, ()
        return _adopt(state, participation.chunks_needed(state.active, message, stamp))
    if state.active is None or message.round_id != state.active.round_id:
        if isinstance(message, RoundEnd) and not message.completed:
            return _order_ended(state, message)
        return _other_round(state, message)
    if isinstance(message, UploadReceipt):
        return _adopt(state, participation.receipt_received(state.active, message, stamp))
    if isinstance(message, RoundEnd):
        # Nobody signs it, and it goes to the log and to the owner's terminal.
        reason = "".join(filter(str.isprintable, message.reason)) or "no reason given"
        outcome = "completed" if message.completed else f"ended: {reason}"
        return _adopt(state, participation.close(state.active, outcome, stamp))
    step = participation.request_received(state.active, profile, state.library, message, stamp)
    return _adopt(state, step)


def _other_round(state: SessionState, message: RoundRequest | UploadReceipt | RoundEnd) -> Result:
    """A message of a round that this device is not in: only a request deserves an answer."""
    if not isinstance(message, Roster | ShareDelivery | SurvivorSet | UnmaskRequest):
        return state, ()
    detail = "this device left the round" if message.round_id in state.used else "it never joined the round"
    answer = ClientAbort(round_id=message.round_id, code="not-in-round", detail=detail)
    return state, (note("request-of-other-round", round=message.round_id, detail=detail), Send(answer))


def _invited(profile: Profile, state: SessionState, message: Invitation, stamp: Stamp) -> Result:
    recent = tuple(at for at in state.joined_at if at > stamp.unix - DAY)
    desk = Desk(
        profile,
        state.library,
        state.active,
        state.used,
        len(recent),
        state.history,
        state.unfit,
        state.fields,
        _offered(profile, message),
    )
    verdict = consider(desk, message.plan, stamp.unix)
    if isinstance(verdict, Accepted):
        ended: Outputs = ()
        if state.active is not None:
            state, ended = _adopt(state, participation.close(state.active, "superseded", stamp))
        library, fetching = state.library, _NOTHING
        about = None if isinstance(verdict.assignment, Answering) else verdict.assignment.manifest
        if desk.offered is not None and about == desk.offered.manifest:
            library, fetching = standing.offered(state.library, desk.offered, stamp)
        active, outputs = participation.check_in(
            profile, message.plan, verdict.plan, verdict.assignment, stamp
        )
        used, joined_at = state.used | {active.round_id}, (*recent, stamp.unix)
        state = replace(state, library=library, active=active, used=used, joined_at=joined_at)
        return state, (*ended, *outputs, *fetching)
    if isinstance(verdict, Repeated | Contradicted) and state.active is not None:
        return _invited_again(state, state.active, verdict, stamp)
    if isinstance(verdict, Waiting):
        waiting = note(
            "waiting-for-version", round=verdict.round_id, model=verdict.model, version=verdict.version
        )
        return state, (waiting,)
    if isinstance(verdict, Refused):
        return _refuse(state, verdict)
    return state, ()


def _ordered(profile: Profile, state: SessionState, message: TrainingOrder, stamp: Stamp) -> Result:
    offered = _offered(profile, message)
    desk = Desk(profile, state.library, None, state.used, 0, state.history, None, offered=offered)
    verdict = consider_order(desk, message.plan, stamp.unix)
    if isinstance(verdict, Refused):
        return _refuse(state, verdict)
    if not isinstance(verdict, Accepted) or not isinstance(verdict.assignment, Training):
        return state, ()
    order = Order(message.plan, verdict.plan, verdict.assignment)
    orders, library, outputs = preparation.ordered(state.orders, state.library, order, _collected(state))
    model, fetching = order.assignment.task.model, _NOTHING
    if orders.get(model) is order and offered is not None and order.assignment.manifest == offered.manifest:
        library, fetching = standing.offered(library, offered, stamp)
    state, preparing = _prepare(replace(state, orders=orders, library=library), stamp)
    pending = library.pending.get(model)
    wanted = pending is not None and pending.order == order.plan.round_id
    said = _ready(state, model) if wanted else _NOTHING
    return state, (*outputs, *said, *fetching, *preparing)


def _ready(state: SessionState, model: str | None = None) -> Outputs:
    """Says which updates wait, of one model or of all; unfit, this device would refuse to contribute them."""
    collected = _collected(state)
    return tuple(
        Send(preparation.ready_message(update))
        for name, update in state.library.pending.items()
        if state.unfit is None and update.order != collected and model in (None, name)
    )


def _order_ended(state: SessionState, message: RoundEnd) -> Result:
    """No buffer of this order comes any more: what was trained for it is erased."""
    orders = {model: each for model, each in state.orders.items() if each.plan.round_id != message.round_id}
    library, outputs = state.library, _NOTHING
    for model, pending in state.library.pending.items():
        if pending.order == message.round_id and pending.order != _collected(state):
            library, told = preparation.dropped(library, model, "its campaign is over")
            outputs += told
    return replace(state, orders=orders, library=library), outputs


def _collected(state: SessionState) -> str | None:
    """The order whose update the active round collects."""
    if state.active is None or not isinstance(state.active.assignment, Training):
        return None
    return state.active.assignment.task.order


def _prepare(state: SessionState, stamp: Stamp) -> Result:
    """Trains by a standing order, while no round wants this device."""
    if state.active is not None or state.unfit is not None or not state.orders:
        return state, ()
    orders, outputs = preparation.advance(state.orders, state.library, stamp)
    return replace(state, orders=orders), outputs


def _not_prepared(state: SessionState, event: PreparationFailed, stamp: Stamp) -> Result:
    order = state.orders.get(event.model)
    orders, outputs = preparation.failed(state.orders, event)
    if orders is state.orders or order is None:
        return state, ()
    state = replace(state, orders=orders)
    if event.fault.code != UNUSABLE:
        return state, outputs
    state, more = _distrusted(state, order.assignment.task.manifest_sha256, event.fault, stamp)
    return state, (*outputs, *more)


def _offered(profile: Profile, message: Invitation | TrainingOrder) -> Version | None:
    """The version that came with an invitation or an order, if a model signer vouches for it."""
    if message.manifest is None:
        return None
    try:
        return models.open_manifest(message.manifest, profile.model_signers)
    except (BadSignature, InvalidManifest):
        return None


def _invited_again(
    state: SessionState, active: ActiveRound, verdict: Repeated | Contradicted, stamp: Stamp
) -> Result:
    if isinstance(verdict, Contradicted):
        fault = Fault("plan-changed", "a second, different plan under the id of this round")
        return _adopt(state, participation.abort(active, fault, stamp))
    # Later phases have their own requests; their answers are not to be given for this one.
    return state, (Send(active.client.answer),) if isinstance(active.client, Advertised) else ()


def _refuse(state: SessionState, refused: Refused) -> Result:
    refusal = warning("plan-refused", round=refused.round_id, code=refused.code, detail=refused.detail)
    if refused.round_id is None:
        return state, (refusal,)
    answer = Refusal(round_id=refused.round_id, code=refused.code, detail=refused.detail[:MAX_DETAIL])
    again = participation.answer_of(state.active) if refused.busy and state.active else None
    # If the aggregator has forgotten the active round, its answer to this ends it here.
    return state, (refusal, Send(answer), *((Send(again),) if again else ()))


def _announced(profile: Profile, state: SessionState, message: ModelAnnouncement, stamp: Stamp) -> Result:
    try:
        told = standing.verified(profile, message)
    except (BadSignature, InvalidManifest, MalformedMessage) as error:
        return state, (warning("announcement-refused", reason=str(error)),)
    if not profile.follows(told.assignment.model):
        return state, ()
    library, outputs = standing.assigned(state.library, told, stamp)
    return _with_library(state, library, outputs, stamp)


def _with_library(state: SessionState, library: Library, outputs: Outputs, stamp: Stamp) -> Result:
    """The state with another library; what it does not need any more is deleted, and a round may go on."""
    if library is state.library:
        return state, outputs
    changed = library.blobs() != state.library.blobs()
    state, working = _advance(replace(state, library=library), stamp)
    return state, (*outputs, *((_keep(state),) if changed else ()), *working)


# --- time, and this device's own work ----------------------------------------------------------------------


def _connected(state: SessionState, stamp: Stamp) -> Result:
    library, fetching = models.ticked(state.library, stamp, hurry=True)
    state = replace(state, library=library)
    # Said again in case it was lost: the aggregator takes each answer once, and ends what it has ended.
    answer = participation.answer_of(state.active) if state.active else None
    said: Outputs = (Send(answer),) if answer else ()
    said += _ready(state)
    return state, (Announce(library.serving(), library.failures()), *fetching, *said)


def _ticked(profile: Profile, state: SessionState, stamp: Stamp) -> Result:
    library, fetching = models.ticked(state.library, stamp)
    active = state.active
    if active is None:
        orders, library, expired = preparation.ticked(state.orders, library, stamp)
        state, preparing = _prepare(replace(state, library=library, orders=orders), stamp)
        state, personalising = _personalise(profile.policy, state)
        return state, (*fetching, *expired, *preparing, *personalising)
    state = replace(state, library=library)
    state, offering = _adopt(state, participation.tick(active, stamp))
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
    return _with_library(state, library, outputs, stamp)


def _distrusted(state: SessionState, sha256: str, fault: Fault, stamp: Stamp) -> Result:
    """A version that had passed its test failed in use: this device goes back to the one before."""
    for name, shelf in state.library.shelves.items():
        version = next((version for version in shelf.known if version.sha256 == sha256), None)
        if version is not None and sha256 not in shelf.bad:
            library, outputs = models.failed(state.library, name, version, fault)
            return _with_library(state, library, outputs, stamp)
    return state, ()


def _failed_in_use(state: SessionState, event: VersionFailed, stamp: Stamp) -> Result:
    """A version failed, or its process crashed: a round that would run it again is left first."""
    active, left = state.active, _NOTHING
    about = None if active is None or isinstance(active.assignment, Answering) else active.assignment.manifest
    if active is not None and about is not None and active.upload is None and about.sha256() == event.sha256:
        state, left = _adopt(state, participation.abort(active, event.fault, stamp))
    state, outputs = _distrusted(state, event.sha256, event.fault, stamp)
    return state, (*left, *outputs)


def _unless_unusable(state: SessionState, event: Personalised, stamp: Stamp) -> Result:
    """The state after fine-tuning; a version that does not run gives way to the one before."""
    if isinstance(event.result, Fault) and event.result.code == UNUSABLE:
        return _distrusted(state, event.sha256, event.result, stamp)
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
        return _adopt(state, participation.trained(active, state.library, event.update, stamp))
    if isinstance(event, UpdateRead):
        return _adopt(state, participation.update_read(active, state.library, event.contribution, stamp))
    if isinstance(event, Evaluated):
        return _adopt(state, participation.evaluated(active, state.library, event.evaluation, stamp))
    if isinstance(event, FieldRead):
        return _adopt(state, participation.field_read(active, state.library, event.value, stamp))
    if isinstance(event, InputWritten):
        return _adopt(state, participation.input_written(active, event.blob, event.local, stamp))
    collected = _collected(state)
    state, outputs = _adopt(state, participation.abort(active, event.fault, stamp))
    model = next((m for m, update in state.library.pending.items() if update.order == collected), None)
    if model is not None and not event.fault.transient:
        # It would fail in the next buffer, too.
        library, told = preparation.dropped(state.library, model, event.fault.code)
        state, outputs = replace(state, library=library), (*outputs, *told)
    if event.fault.code != UNUSABLE or not isinstance(active.assignment, Training | Evaluating):
        return state, outputs
    state, more = _distrusted(state, active.assignment.task.manifest_sha256, event.fault, stamp)
    return state, (*outputs, *more)


def _advance(state: SessionState, stamp: Stamp) -> Result:
    if state.active is None:
        return state, ()
    return _adopt(state, participation.advance(state.active, state.library, stamp))


def _adopt(state: SessionState, step: Step) -> Result:
    """Takes over what a round became; when it is over, its base version may be, too."""
    active, outputs = step
    history, library = state.history, state.library
    for output in outputs:
        if isinstance(output, SaveContribution):
            history = history.with_contribution(output.entry.at, output.entry.event)
        elif isinstance(output, SaveLocal):
            library = library.with_local(output)
        elif isinstance(output, DropPending):
            library = library.without_pending(output.model)
    ended = state.active is not None and active is None
    state = replace(state, active=active, history=history, library=library)
    return state, (*outputs, _keep(state)) if ended else outputs


def _keep(state: SessionState) -> KeepBlobs:
    """The files that are still needed: those of the library, and of the version that the round is about."""
    needed = state.library.blobs().union(*(order.blobs for order in state.orders.values()))
    if state.active is not None and not isinstance(state.active.assignment, Answering):
        manifest = state.active.assignment.manifest
        needed |= {manifest.graph.sha256, manifest.weights.sha256}
    return KeepBlobs(needed)
