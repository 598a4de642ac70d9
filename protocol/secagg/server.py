"""The aggregator's side of a round, as a state machine that sees masked inputs only as "stored".

Theory of operation. Clients answer the request of the current phase; `ClosePhase` ends the phase, by deadline
or because everyone answered, and whoever did not answer drops out:

    Advertising  --ClosePhase-->  Sharing     request: Roster
    Sharing      --ClosePhase-->  Collecting  request: ShareDelivery
    Collecting   --ClosePhase-->  Checking    request: SurvivorSet
    Checking     --ClosePhase-->  Unmasking   request: UnmaskRequest
    Unmasking    --ClosePhase-->  Recovered   the masks that remain in the sum
    any          --too few-->     Failed

What to send follows from the state alone (`request`), so after a restart the same requests go out again. The
vectors never pass through here: the caller adds each accepted masked input to one partial sum, and takes
`Recovered.masks` off it.

Protocol: Bonawitz et al. 2017 (ePrint 2017/281, Fig. 4), Bell et al. 2020 (ePrint 2020/704).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.columns import SignatureColumn
from protocol.errors import BadSignature, IllegalEvent, MalformedMessage
from protocol.identity import verify
from protocol.messages import (
    AdvertiseKeys,
    ClientAbort,
    ConsistencySignature,
    Refusal,
    Roster,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    UnmaskingShares,
    UnmaskRequest,
)
from protocol.secagg import roster as rosters
from protocol.secagg.closing import close_phase
from protocol.secagg.growing import GrowingMap
from protocol.secagg.key_agreement import check_public_key
from protocol.secagg.server_state import (
    Advertising,
    Checking,
    Cohort,
    Collecting,
    Failed,
    Recovered,
    ServerContext,
    ServerState,
    SharesSent,
    Sharing,
    Unmasking,
)

ClientMessage = AdvertiseKeys | ShareKeys | ConsistencySignature | UnmaskingShares | Refusal | ClientAbort
Request = Roster | ShareDelivery | SurvivorSet | UnmaskRequest


@dataclass(frozen=True)
class Received:
    """A message of a device, whose id the broker vouches for.

    Attributes:
        now: seconds since 1970, for the certificates.
    """

    device_id: str
    message: ClientMessage
    now: int


@dataclass(frozen=True)
class InputStored:
    """A masked input of the right size is in the partial sum, exactly once."""

    device_id: str


@dataclass(frozen=True)
class ClosePhase:
    """The phase is over: its deadline came, or nobody is awaited any more."""


Event = Received | InputStored | ClosePhase


def begin(context: ServerContext) -> Advertising:
    """Opens a round for check-in."""
    return Advertising(context, GrowingMap())


def handle(state: ServerState, event: Event) -> ServerState:
    """Applies one event.

    A repeated answer changes nothing; the first one counts.

    Raises:
        IllegalEvent: an answer that this phase, or this client, does not owe; nothing changed.
        BadSignature, MalformedMessage: an answer that does not verify; nothing changed.
    """
    if isinstance(event, ClosePhase):
        return close_phase(state)
    if isinstance(event, InputStored):
        if not isinstance(state, Collecting):
            raise IllegalEvent(f"a masked input in phase {type(state).__name__}")
        index = _member(state.cohort, event.device_id)
        if index not in state.sharers:
            raise IllegalEvent(f"{event.device_id} shared no keys: its masks would never cancel")
        if index in state.stored:
            return state
        return replace(state, stored=state.stored.with_item(index, None))
    return _receive(state, event)


def _member(cohort: Cohort, device_id: str) -> int:
    index = cohort.index.get(device_id)
    if index is None:
        raise IllegalEvent(f"{device_id} is not in this round")
    return index


def _receive(state: ServerState, event: Received) -> ServerState:
    message, device_id = event.message, event.device_id
    if message.round_id != state.context.round_id:
        raise IllegalEvent(f"a message of round {message.round_id}")
    if isinstance(message, Refusal | ClientAbort):
        return _leave(state, device_id)
    if isinstance(message, AdvertiseKeys) and isinstance(state, Advertising):
        return _advertise(state, device_id, message, event.now)
    if isinstance(message, ShareKeys) and isinstance(state, Sharing):
        return _share(state, _member(state.cohort, device_id), message)
    if isinstance(message, ConsistencySignature) and isinstance(state, Checking):
        return _check(state, _member(state.cohort, device_id), message)
    if isinstance(message, UnmaskingShares) and isinstance(state, Unmasking):
        return _unmask(state, _member(state.cohort, device_id), message)
    raise IllegalEvent(f"{message.type} in phase {type(state).__name__}")


def _leave(state: ServerState, device_id: str) -> ServerState:
    if isinstance(state, Recovered | Failed):
        raise IllegalEvent("the round is over")
    if isinstance(state, Advertising):
        if device_id not in state.context.invited:
            raise IllegalEvent(f"{device_id} is not invited")
        entries = state.entries
        if device_id in entries:
            entries = GrowingMap((d, entry) for d, entry in entries.items() if d != device_id)
        return replace(state, entries=entries, left=state.left | {device_id})
    return replace(state, left=state.left | {_member(state.cohort, device_id)})


def _advertise(state: Advertising, device_id: str, message: AdvertiseKeys, now: int) -> ServerState:
    context = state.context
    if device_id not in context.invited or device_id in state.left:
        raise IllegalEvent(f"{device_id} is not invited")
    if device_id in state.entries:
        return state
    certificate = context.certificates.verify(message.certificate, context.ca, now=now)
    if certificate.device_id != device_id:
        raise BadSignature(f"{device_id} checks in with the certificate of {certificate.device_id}")
    payload = rosters.advertisement_payload(
        context.fleet, context.round_id, context.plan_hash, message.encryption_key, message.mask_key
    )
    verify(certificate.public_key, rosters.ADVERTISE_KIND, payload, message.signature)
    # One such key in the roster would make every neighbour abort.
    check_public_key(message.encryption_key)
    check_public_key(message.mask_key)
    entry = (message, certificate.public_key.public_bytes_raw())
    return replace(state, entries=state.entries.with_item(device_id, entry))


def _share(state: Sharing, index: int, message: ShareKeys) -> ServerState:
    if index in state.received:
        return state
    if message.roster_hash != state.cohort.roster_hash:
        raise MalformedMessage("shares for another roster")
    if message.shares.peers != state.cohort.near[index].tobytes():
        raise MalformedMessage("shares for other clients than the neighbours")
    sent = SharesSent(message.seed_commitment, message.shares.values)
    return replace(state, received=state.received.with_item(index, sent))


def _check(state: Checking, index: int, message: ConsistencySignature) -> ServerState:
    if index not in state.survivors:
        raise IllegalEvent(f"client {index} dropped out before")
    if index in state.signatures:
        return state
    if message.survivors_hash != state.survivors_hash:
        raise MalformedMessage("a signature on another survivor set")
    key = Ed25519PublicKey.from_public_bytes(state.cohort.members[index].identity_key)
    verify(key, rosters.SURVIVORS_KIND, message.survivors_hash, message.signature)
    return replace(state, signatures=state.signatures.with_item(index, message.signature))


def _unmask(state: Unmasking, index: int, message: UnmaskingShares) -> ServerState:
    if index not in state.signatures:
        raise IllegalEvent(f"client {index} dropped out before")
    if index in state.answers:
        return state
    if message.survivors_hash != state.survivors_hash:
        raise MalformedMessage("shares for another survivor set")
    asked = {*state.cohort.neighbours[index], index} & state.sharers.keys()
    if not asked.issuperset(message.shares.indices()):
        raise MalformedMessage("shares of other secrets than the ones asked for")
    return replace(state, answers=state.answers.with_item(index, message.shares))


# --- what follows from a state ---------------------------------------------------------------------------


def awaited(state: ServerState) -> frozenset[str]:
    """The devices whose answer the current phase still waits for."""
    if isinstance(state, Advertising):
        return state.context.invited - state.entries.keys() - state.left
    if isinstance(state, Recovered | Failed):
        return frozenset()
    missing: set[int]
    if isinstance(state, Sharing):
        missing = {*range(state.cohort.graph.size)} - state.received.keys()
    elif isinstance(state, Collecting):
        missing = state.sharers.keys() - state.survivors
    elif isinstance(state, Checking):
        missing = {*state.survivors} - state.signatures.keys()
    else:
        missing = state.signatures.keys() - state.answers.keys()
    return frozenset(state.cohort.members[index].device_id for index in missing - state.left)


def pending(state: ServerState) -> int:
    """How many devices `awaited` names, without naming them: in time that does not grow with the cohort."""
    if isinstance(state, Recovered | Failed):
        return 0
    if isinstance(state, Advertising):
        gone = sum(device_id in state.context.invited for device_id in state.left)
        return len(state.context.invited) - len(state.entries) - gone
    owing: Collection[int]
    answered: Collection[int]
    if isinstance(state, Sharing):
        owing, answered = range(state.cohort.graph.size), state.received
    elif isinstance(state, Collecting):
        owing, answered = state.sharers, state.stored
    elif isinstance(state, Checking):
        owing, answered = state.survivors, state.signatures
    else:
        owing, answered = state.signatures, state.answers
    gone = sum(index in owing and index not in answered for index in state.left)
    return len(owing) - len(answered) - gone


def request(state: ServerState, device_id: str) -> Request | None:
    """What the current phase asks of one device; None while checking in, and after the end."""
    if isinstance(state, Advertising | Recovered | Failed):
        return None
    index = _member(state.cohort, device_id)
    round_id, cohort = state.context.round_id, state.cohort
    if isinstance(state, Sharing):
        entries = cohort.entries
        if not cohort.graph.complete:
            shown = sorted({*cohort.neighbours[index], index})
            entries = tuple(cohort.members[peer].entry for peer in shown)
        return Roster(round_id=round_id, size=cohort.graph.size, root=cohort.root, entries=entries)
    if isinstance(state, Collecting):
        return ShareDelivery(round_id=round_id, roster_hash=cohort.roster_hash, shares=state.mail.to(index))
    if isinstance(state, Checking):
        return SurvivorSet(round_id=round_id, survivors=state.members)
    # A quorum and no more: every signature costs the client a verification.
    signers = [peer for peer in cohort.neighbours[index] if peer in state.signatures]
    others = signers[: cohort.graph.threshold - cohort.graph.complete]
    signed = {*others, index} & state.signatures.keys()
    signatures = SignatureColumn.of({peer: state.signatures[peer] for peer in signed})
    return UnmaskRequest(round_id=round_id, survivors_hash=state.survivors_hash, signatures=signatures)
