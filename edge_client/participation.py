"""One round as this device lives it, from its check-in to the erasure of its secrets.

Around the protocol's own state machine (`protocol.secagg.client`) this adds what that one cannot know: which
context to join with, what to do with a request that comes too early, and that an upload is offered until its
receipt comes. What it works on meanwhile is `edge_client.round_work`.

    Advertised --Roster--> SharesSent --ShareDelivery--> Masking --> InputSent --> SetSigned --> Unmasked
                               |                            |           |
                       work starts here        masked when done    offered until the receipt
"""

from __future__ import annotations

from dataclasses import replace

from edge_client.active_round import OFFER_SECONDS, ActiveRound, Step, close, leave, save
from edge_client.events import Stamp
from edge_client.library import Library
from edge_client.outputs import Outputs, Send, SendChunks, note
from edge_client.profile import Profile
from edge_client.round_work import advance
from models.assignment import Assignment, described
from protocol.errors import IllegalEvent
from protocol.identity import SignedDocument
from protocol.messages import (
    BlobNeed,
    Roster,
    ShareDelivery,
    SurvivorSet,
    UnmaskRequest,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import Plan
from protocol.secagg import client as secagg
from protocol.secagg.client_state import Aborted, InputSent, RoundContext
from protocol.secagg.prg import derive_key

MAX_OFFER_SECONDS = 15.0

RoundRequest = Roster | ShareDelivery | SurvivorSet | UnmaskRequest


def check_in(
    profile: Profile, document: SignedDocument, plan: Plan, assignment: Assignment, stamp: Stamp
) -> tuple[ActiveRound, Outputs]:
    """Joins a round whose plan was verified and agreed to."""
    context = RoundContext(
        fleet=profile.fleet,
        round_id=plan.round_id,
        plan_hash=document.digest,
        ca=profile.ca,
        device_id=profile.device_id,
        minimum_cohort=max(plan.cohort.minimum, profile.policy.minimum_cohort),
        maximum_cohort=plan.cohort.split.largest,
        minimum_survivors=max(plan.cohort.minimum_survivors, profile.policy.minimum_survivors),
        graph=plan.cohort.graph,
        split=plan.cohort.split,
    )
    entropy = derive_key(stamp.entropy, purpose="edge/check-in")
    client = secagg.begin(context, profile.certificate, profile.identity, entropy)
    active = ActiveRound(document, plan, assignment, client)
    return active, (
        save(active, stamp),
        note("checked-in", round=plan.round_id, task=described(plan.task)),
        Send(client.answer),
    )


def request_received(
    active: ActiveRound, profile: Profile, library: Library, message: RoundRequest, stamp: Stamp
) -> Step:
    """A request of the protocol came: answer, abort, or ignore what comes too early."""
    event: secagg.Event
    if isinstance(message, Roster):
        entropy = derive_key(stamp.entropy, purpose="edge/share-keys")
        event = secagg.RosterReceived(message, entropy, stamp.unix, profile.certificates)
    elif isinstance(message, ShareDelivery):
        event = secagg.SharesReceived(message)
    elif isinstance(message, SurvivorSet):
        event = secagg.SurvivorsReceived(message, profile.identity)
    else:
        event = secagg.UnmaskRequested(message)
    try:
        client, answer = secagg.handle(active.client, event)
    except IllegalEvent as error:
        # Reordered, or repeated after a restart: the aggregator asks again when it is its turn.
        return active, (note("message-too-early", round=active.round_id, detail=str(error)),)
    if isinstance(client, Aborted):
        return leave(client, stamp)
    outputs: Outputs = (Send(answer),) if answer is not None else ()
    if client is active.client:
        return active, outputs
    before, active = type(active.client).__name__, replace(active, client=client)
    moved = note("phase", round=active.round_id, before=before, now=type(client).__name__)
    following, more = advance(active, library, stamp)
    return following, (save(active, stamp), moved, *outputs, *more)


def chunks_needed(active: ActiveRound, need: BlobNeed, stamp: Stamp) -> Step:
    """The aggregator pulls chunks of the masked input."""
    if active.upload != need.blob:
        return active, ()
    # While it pulls it has the offer; offering again would only cost a message.
    later = replace(active, offer_at=stamp.steady + 2 * OFFER_SECONDS, patience=OFFER_SECONDS)
    return later, (SendChunks(active.round_id, need),)


def receipt_received(active: ActiveRound, receipt: UploadReceipt, stamp: Stamp) -> Step:
    """The masked input is durably stored at the aggregator, or will never be used."""
    if active.upload != receipt.blob or active.uploaded:
        return active, ()
    if not receipt.accepted:
        # Its masks may already count as those of a dropout, so that nothing is left to answer.
        return close(active, f"upload refused: {receipt.code}", stamp)
    active = replace(active, uploaded=True)
    return active, (save(active, stamp), note("uploaded", round=active.round_id))


def tick(active: ActiveRound, stamp: Stamp, *, hurry: bool = False) -> Step:
    """Ends an expired round; offers an upload again that nobody acknowledged."""
    if stamp.unix >= active.plan.expires_at:
        return close(active, "the plan expired", stamp)
    if not isinstance(active.client, InputSent) or active.uploaded:
        return active, ()
    if not hurry and stamp.steady < active.offer_at:
        return active, ()
    patience = OFFER_SECONDS if hurry else min(1.5 * active.patience, MAX_OFFER_SECONDS)
    offer = UploadOffer(round_id=active.round_id, blob=active.client.masked_input)
    return replace(active, offer_at=stamp.steady + patience, patience=patience), (Send(offer),)
