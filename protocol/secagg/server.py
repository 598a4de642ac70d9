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

from collections.abc import Callable
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import BadSignature, IllegalEvent, MalformedMessage
from protocol.identity import verify, verify_certificate
from protocol.messages import (
    AddressedShares,
    AdvertiseKeys,
    ClientAbort,
    ConsistencySignature,
    Refusal,
    Roster,
    RosterEntry,
    ShareDelivery,
    ShareKeys,
    SignedBy,
    SurvivorSet,
    UnmaskingShares,
    UnmaskRequest,
)
from protocol.secagg import roster as rosters
from protocol.secagg.graph import neighbours
from protocol.secagg.key_agreement import public_key
from protocol.secagg.masking import Mask, pairwise_mask, seed_commitment, self_mask
from protocol.secagg.parameters import parameters
from protocol.secagg.server_state import (
    Advertising,
    Checking,
    Cohort,
    Collecting,
    Failed,
    Member,
    Recovered,
    ServerContext,
    ServerState,
    Sharing,
    Unmasking,
)
from protocol.secagg.shamir import UnrecoverableSecret, recover

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
    return Advertising(context, {})


def handle(state: ServerState, event: Event) -> ServerState:
    """Applies one event.

    A repeated answer changes nothing; the first one counts.

    Raises:
        IllegalEvent: an answer that this phase, or this client, does not owe; nothing changed.
        BadSignature, MalformedMessage: an answer that does not verify; nothing changed.
    """
    if isinstance(event, ClosePhase):
        return _close(state)
    if isinstance(event, InputStored):
        if not isinstance(state, Collecting):
            raise IllegalEvent(f"a masked input in phase {type(state).__name__}")
        index = _member(state.cohort, event.device_id)
        if index not in state.sharers:
            raise IllegalEvent(f"{event.device_id} shared no keys: its masks would never cancel")
        return replace(state, survivors=state.survivors | {index})
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
        entries = {d: entry for d, entry in state.entries.items() if d != device_id}
        return replace(state, entries=entries, left=state.left | {device_id})
    return replace(state, left=state.left | {_member(state.cohort, device_id)})


def _advertise(state: Advertising, device_id: str, message: AdvertiseKeys, now: int) -> ServerState:
    context = state.context
    if device_id not in context.invited or device_id in state.left:
        raise IllegalEvent(f"{device_id} is not invited")
    if device_id in state.entries:
        return state
    certificate = verify_certificate(message.certificate, context.ca, now=now)
    if certificate.device_id != device_id:
        raise BadSignature(f"{device_id} checks in with the certificate of {certificate.device_id}")
    payload = rosters.advertisement_payload(
        context.fleet, context.round_id, context.plan_hash, message.encryption_key, message.mask_key
    )
    verify(certificate.public_key, rosters.ADVERTISE_KIND, payload, message.signature)
    entry = (message, certificate.public_key.public_bytes_raw())
    return replace(state, entries={**state.entries, device_id: entry})


def _share(state: Sharing, index: int, message: ShareKeys) -> ServerState:
    if index in state.received:
        return state
    if message.roster_hash != state.cohort.roster_hash:
        raise MalformedMessage("shares for another roster")
    peers = [item.peer for item in message.shares]
    if sorted(peers) != list(state.cohort.neighbours[index]):
        raise MalformedMessage("shares for other clients than the neighbours")
    return replace(state, received={**state.received, index: message})


def _check(state: Checking, index: int, message: ConsistencySignature) -> ServerState:
    if index not in state.survivors:
        raise IllegalEvent(f"client {index} dropped out before")
    if index in state.signatures:
        return state
    if message.survivors_hash != state.survivors_hash:
        raise MalformedMessage("a signature on another survivor set")
    key = Ed25519PublicKey.from_public_bytes(state.cohort.members[index].identity_key)
    verify(key, rosters.SURVIVORS_KIND, message.survivors_hash, message.signature)
    return replace(state, signatures={**state.signatures, index: message.signature})


def _unmask(state: Unmasking, index: int, message: UnmaskingShares) -> ServerState:
    if index not in state.signatures:
        raise IllegalEvent(f"client {index} dropped out before")
    if index in state.answers:
        return state
    if message.survivors_hash != state.survivors_hash:
        raise MalformedMessage("shares for another survivor set")
    near = {*state.cohort.neighbours[index], index}
    seeds = [item.peer for item in message.seed_shares]
    keys = [item.peer for item in message.key_shares]
    allowed_seeds = near & state.survivors
    allowed_keys = (near & state.sharers.keys()) - state.survivors
    if len({*seeds, *keys}) != len(seeds) + len(keys) or not (
        allowed_seeds.issuperset(seeds) and allowed_keys.issuperset(keys)
    ):
        raise MalformedMessage("shares of other secrets than the ones asked for")
    return replace(state, answers={**state.answers, index: message})


# --- closing a phase -------------------------------------------------------------------------------------


def _close(state: ServerState) -> ServerState:
    if isinstance(state, Advertising):
        return _close_advertising(state)
    if isinstance(state, Sharing):
        return _close_sharing(state)
    if isinstance(state, Collecting):
        return _close_collecting(state)
    if isinstance(state, Checking):
        return _close_checking(state)
    if isinstance(state, Unmasking):
        return _close_unmasking(state)
    raise IllegalEvent("the round is over")


def _close_advertising(state: Advertising) -> ServerState:
    context, size = state.context, len(state.entries)
    if size < max(2, context.minimum_cohort):
        return Failed(
            context, "too-few-check-ins", f"{size} devices checked in, {context.minimum_cohort} needed"
        )
    graph = parameters(size, context.graph)
    devices = sorted(state.entries)
    tree = rosters.merkle_tree([rosters.leaf_hash(state.entries[d][0]) for d in devices])
    members = []
    for index, device_id in enumerate(devices):
        advertised, identity_key = state.entries[device_id]
        entry = RosterEntry(
            index=index,
            certificate=advertised.certificate,
            encryption_key=advertised.encryption_key,
            mask_key=advertised.mask_key,
            signature=advertised.signature,
            path=() if graph.complete else rosters.merkle_path(tree, index),
        )
        members.append(Member(device_id, identity_key, entry))
    root = tree[-1][0]
    name = rosters.roster_hash(context.round_id, context.plan_hash, size, root)
    near = tuple(neighbours(graph, name, index) for index in range(size))
    cohort = Cohort(name, root, graph, tuple(members), near, {d: i for i, d in enumerate(devices)})
    return Sharing(context, cohort, {})


def _enough(cohort: Cohort, present: frozenset[int], minimum: int) -> bool:
    return len(present) >= minimum and all(cohort.quorum(index, present) for index in present)


def _close_sharing(state: Sharing) -> ServerState:
    present = frozenset(state.received)
    if not _enough(state.cohort, present, state.context.minimum_survivors):
        detail = f"{len(present)} of {state.cohort.graph.size} clients shared their keys"
        return Failed(state.context, "too-few-shares", detail)
    inbox: dict[int, list[AddressedShares]] = {index: [] for index in present}
    for sender in sorted(present):
        for item in state.received[sender].shares:
            if item.peer in present:
                inbox[item.peer].append(AddressedShares(peer=sender, sealed=item.sealed))
    deliveries = {index: tuple(items) for index, items in inbox.items()}
    return Collecting(state.context, state.cohort, state.received, deliveries, left=state.left & present)


def _close_collecting(state: Collecting) -> ServerState:
    if not _enough(state.cohort, state.survivors, state.context.minimum_survivors):
        detail = f"{len(state.survivors)} of {len(state.sharers)} masked inputs arrived"
        return Failed(state.context, "too-few-survivors", detail)
    left = state.left & state.survivors
    return Checking(state.context, state.cohort, state.sharers, state.survivors, {}, left)


def _close_checking(state: Checking) -> ServerState:
    signers = frozenset(state.signatures)
    if not all(state.cohort.quorum(index, signers) for index in signers) or not signers:
        detail = f"{len(signers)} of {len(state.survivors)} survivors signed the survivor set"
        return Failed(state.context, "too-few-signatures", detail)
    return Unmasking(
        state.context,
        state.cohort,
        state.sharers,
        state.survivors,
        state.signatures,
        state.survivors_hash,
        {},
        state.left & signers,
    )


def _close_unmasking(state: Unmasking) -> ServerState:
    cohort, name = state.cohort, state.cohort.roster_hash
    shares: dict[int, dict[int, bytes]] = {index: {} for index in state.sharers}
    for holder, answer in state.answers.items():
        for item in (*answer.seed_shares, *answer.key_shares):
            shares[item.peer][holder + 1] = item.share
    masks: list[Mask] = []
    wrong: set[int] = set()
    try:
        for index in state.sharers:
            secret, bad = recover(shares[index], cohort.graph.threshold, _secret_check(state, index))
            if index in state.survivors:
                masks.append(self_mask(secret, name, index).inverse())
            else:
                masks.extend(
                    # What the surviving neighbour added for the dropped client still stands in the sum.
                    pairwise_mask(secret, cohort.members[peer].entry.mask_key, name, index, peer)
                    for peer in cohort.neighbours[index]
                    if peer in state.survivors
                )
            wrong |= {holder - 1 for holder in bad}
    except UnrecoverableSecret as error:
        return Failed(state.context, "unmasking-failed", f"client {index}: {error}")
    return Recovered(state.context, cohort, state.survivors, tuple(masks), frozenset(wrong))


def _secret_check(state: Unmasking, index: int) -> Callable[[bytes], bool]:
    """Tells the seed (of a survivor) or mask key (of a dropout) that `index` committed to from garbage."""
    if index in state.survivors:
        name, commitment = state.cohort.roster_hash, state.sharers[index].seed_commitment
        return lambda seed: seed_commitment(seed, name, index) == commitment
    mask_key = state.cohort.members[index].entry.mask_key
    return lambda private: public_key(private) == mask_key


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


def request(state: ServerState, device_id: str) -> Request | None:
    """What the current phase asks of one device; None while checking in, and after the end."""
    if isinstance(state, Advertising | Recovered | Failed):
        return None
    index = _member(state.cohort, device_id)
    round_id, cohort = state.context.round_id, state.cohort
    if isinstance(state, Sharing):
        shown = (
            range(cohort.graph.size) if cohort.graph.complete else sorted({*cohort.neighbours[index], index})
        )
        entries = tuple(cohort.members[peer].entry for peer in shown)
        return Roster(round_id=round_id, size=cohort.graph.size, root=cohort.root, entries=entries)
    if isinstance(state, Collecting):
        return ShareDelivery(
            round_id=round_id, roster_hash=cohort.roster_hash, shares=state.inbox.get(index, ())
        )
    if isinstance(state, Checking):
        return SurvivorSet(round_id=round_id, survivors=state.members)
    signatures = tuple(
        SignedBy(peer=peer, signature=state.signatures[peer])
        for peer in sorted({*cohort.neighbours[index], index} & state.signatures.keys())
    )
    return UnmaskRequest(round_id=round_id, survivors_hash=state.survivors_hash, signatures=signatures)
