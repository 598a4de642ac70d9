"""What the device makes of the plans that it is asked to join: invitations to rounds, and standing orders."""

from __future__ import annotations

from dataclasses import replace

from edge_client import active_round, models, participation, preparation, standing
from edge_client.active_round import ActiveRound
from edge_client.events import Fault, PreparationFailed, Stamp
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
from edge_client.ledger import DAY
from edge_client.library import Version
from edge_client.outputs import NOTHING, Outputs, Send, note, warning
from edge_client.preparation import Order
from edge_client.profile import Profile
from edge_client.session_state import UNUSABLE, Result, SessionState, adopt, collected_order, distrust
from models.assignment import Answering, Training
from models.manifest import InvalidManifest
from protocol.errors import BadSignature
from protocol.messages import Invitation, Refusal, RoundEnd, TrainingOrder
from protocol.secagg.client_state import Advertised


def invited(profile: Profile, state: SessionState, message: Invitation, stamp: Stamp) -> Result:
    """Joins the round that an invitation is to, repeats the answer to it, or refuses it."""
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
            state, ended = adopt(state, active_round.close(state.active, "superseded", stamp))
        library, fetching = state.library, NOTHING
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


def ordered(profile: Profile, state: SessionState, message: TrainingOrder, stamp: Stamp) -> Result:
    """Takes in a standing order, and trains by it as soon as it can."""
    offered = _offered(profile, message)
    desk = Desk(profile, state.library, None, state.used, 0, state.history, None, offered=offered)
    verdict = consider_order(desk, message.plan, stamp.unix)
    if isinstance(verdict, Refused):
        return _refuse(state, verdict)
    if not isinstance(verdict, Accepted) or not isinstance(verdict.assignment, Training):
        return state, ()
    order = Order(message.plan, verdict.plan, verdict.assignment)
    orders, library, outputs = preparation.ordered(state.orders, state.library, order, collected_order(state))
    model, fetching = order.assignment.task.model, NOTHING
    if orders.get(model) is order and offered is not None and order.assignment.manifest == offered.manifest:
        library, fetching = standing.offered(library, offered, stamp)
    state, preparing = prepare(replace(state, orders=orders, library=library), stamp)
    pending = library.pending.get(model)
    wanted = pending is not None and pending.order == order.plan.round_id
    said = ready(state, model) if wanted else NOTHING
    return state, (*outputs, *said, *fetching, *preparing)


def ready(state: SessionState, model: str | None = None) -> Outputs:
    """Says which updates wait, of one model or of all; unfit, this device would refuse to contribute them."""
    collected = collected_order(state)
    return tuple(
        Send(preparation.ready_message(update))
        for name, update in state.library.pending.items()
        if state.unfit is None and update.order != collected and model in (None, name)
    )


def order_ended(state: SessionState, message: RoundEnd) -> Result:
    """No buffer of this order comes any more: what was trained for it is erased."""
    orders = {model: each for model, each in state.orders.items() if each.plan.round_id != message.round_id}
    library, outputs = state.library, NOTHING
    for model, pending in state.library.pending.items():
        if pending.order == message.round_id and pending.order != collected_order(state):
            library, told = preparation.dropped(library, model, "its campaign is over")
            outputs += told
    return replace(state, orders=orders, library=library), outputs


def prepare(state: SessionState, stamp: Stamp) -> Result:
    """Trains by a standing order, while no round wants this device."""
    if state.active is not None or state.unfit is not None or not state.orders:
        return state, ()
    orders, outputs = preparation.advance(state.orders, state.library, stamp)
    return replace(state, orders=orders), outputs


def not_prepared(state: SessionState, event: PreparationFailed, stamp: Stamp) -> Result:
    """Training by a standing order failed; a version that does not run gives way to the one before."""
    order = state.orders.get(event.model)
    orders, outputs = preparation.failed(state.orders, event)
    if orders is state.orders or order is None:
        return state, ()
    state = replace(state, orders=orders)
    if event.fault.code != UNUSABLE:
        return state, outputs
    state, more = distrust(state, order.assignment.task.manifest_sha256, event.fault, stamp)
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
        return adopt(state, active_round.abort(active, fault, stamp))
    # Later phases have their own requests; their answers are not to be given for this one.
    return state, (Send(active.client.answer),) if isinstance(active.client, Advertised) else ()


def _refuse(state: SessionState, refused: Refused) -> Result:
    refusal = warning("plan-refused", round=refused.round_id, code=refused.code, detail=refused.detail)
    if refused.round_id is None:
        return state, (refusal,)
    answer = Refusal(round_id=refused.round_id, code=refused.code, detail=refused.detail[:MAX_DETAIL])
    again = active_round.answer_of(state.active) if refused.busy and state.active else None
    # If the aggregator has forgotten the active round, its answer to this ends it here.
    return state, (refusal, Send(answer), *((Send(again),) if again else ()))
