"""How each phase of a round ends, from check-ins to the masks that remain in the sum."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

from protocol.errors import IllegalEvent
from protocol.messages import RosterEntry
from protocol.secagg import roster as rosters
from protocol.secagg.blame import dealt_wrongly, liars
from protocol.secagg.graph import all_neighbours
from protocol.secagg.growing import GrowingMap
from protocol.secagg.key_agreement import load_private, public_key
from protocol.secagg.masking import Mask, pairwise_mask, seed_commitment, self_mask
from protocol.secagg.parameters import NoGraph, parameters
from protocol.secagg.prg import derive_key
from protocol.secagg.routing import SealedMail
from protocol.secagg.server_state import (
    Advertising,
    Checking,
    Cohort,
    Collecting,
    Failed,
    Member,
    Recovered,
    ServerState,
    Sharing,
    Unmasking,
)
from protocol.secagg.shamir import UnrecoverableSecret, recover


def close_phase(state: ServerState) -> ServerState:
    """Ends the current phase; whoever did not answer has dropped out.

    Raises:
        IllegalEvent: the round is over.
    """
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


def can_close(state: ServerState) -> bool:
    """Whether the round would go on if the current phase ended now; asked again and again, so it is cheap.

    In the last phase it counts shares and checks none: enough of them may still turn out to be wrong.
    """
    if isinstance(state, Sharing):
        return _enough(state.cohort, frozenset(state.received), state.context.minimum_survivors)
    if not isinstance(state, Unmasking):
        return not isinstance(close_phase(state), Failed)
    shares = Counter(owner for answer in state.answers.values() for owner in answer.indices())
    return all(shares[owner] >= state.cohort.graph.threshold for owner in state.sharers)


def _close_advertising(state: Advertising) -> ServerState:
    context, size = state.context, len(state.entries)
    if size < max(2, context.minimum_cohort):
        return Failed(
            context, "too-few-check-ins", f"{size} devices checked in, {context.minimum_cohort} needed"
        )
    try:
        graph = parameters(size, context.split.assumptions(size, context.graph))
    except NoGraph as error:
        return Failed(context, "no-graph", str(error))
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
    near = all_neighbours(graph, name)
    cohort = Cohort(name, root, graph, tuple(members), near, {d: i for i, d in enumerate(devices)})
    return Sharing(context, cohort, GrowingMap())


def _enough(cohort: Cohort, present: frozenset[int], minimum: int) -> bool:
    return len(present) >= minimum and all(cohort.quorum(index, present) for index in present)


def _close_sharing(state: Sharing) -> ServerState:
    present = frozenset(state.received)
    if not _enough(state.cohort, present, state.context.minimum_survivors):
        detail = f"{len(present)} of {state.cohort.graph.size} clients shared their keys"
        return Failed(state.context, "too-few-shares", detail)
    cohort, received = state.cohort, dict(state.received)
    mail = SealedMail(cohort.near, cohort.edges, {index: sent.sealed for index, sent in received.items()})
    commitments = {index: sent.seed_commitment for index, sent in received.items()}
    return Collecting(state.context, cohort, commitments, mail, left=state.left & present)


def _close_collecting(state: Collecting) -> ServerState:
    survivors, cohort = frozenset(state.stored), state.cohort
    if not _enough(cohort, survivors, state.context.minimum_survivors):
        detail = f"{len(survivors)} of {len(state.sharers)} masked inputs arrived"
        return Failed(state.context, "too-few-survivors", detail)
    members = rosters.members_to_bytes(survivors, cohort.graph.size)
    name = rosters.survivors_hash(cohort.roster_hash, members)
    left = state.left & survivors
    return Checking(state.context, cohort, state.sharers, survivors, members, name, GrowingMap(), left)


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
        dict(state.signatures),
        state.survivors_hash,
        GrowingMap(),
        state.left & signers,
    )


def _close_unmasking(state: Unmasking) -> ServerState:
    cohort, name = state.cohort, state.cohort.roster_hash
    shares: dict[int, dict[int, bytes]] = {index: {} for index in state.sharers}
    for holder, answer in state.answers.items():
        for owner, share in answer.by_peer().items():
            shares[owner][holder + 1] = share
    masks: list[Mask] = []
    wrong: dict[int, frozenset[int]] = {}
    # On the complete graph all secrets have the same holders.
    salt = _share_check_salt(state) if cohort.graph.complete else None
    try:
        for index in state.sharers:
            check = _secret_check(state, index)
            secret, bad = recover(shares[index], cohort.graph.threshold, check, salt=salt)
            if index in state.survivors:
                masks.append(self_mask(secret, name, index).inverse())
            else:
                private = load_private(secret)
                masks.extend(
                    # What the surviving neighbour added for the dropped client still stands in the sum.
                    pairwise_mask(private, cohort.members[peer].entry.mask_key, name, index, peer)
                    for peer in cohort.neighbours[index]
                    if peer in state.survivors
                )
            wrong[index] = frozenset(holder - 1 for holder in bad)
    except UnrecoverableSecret as error:
        device_id = cohort.members[index].device_id
        blamed = frozenset({device_id} if dealt_wrongly(cohort.graph, shares, index) else ())
        return Failed(state.context, "unmasking-failed", f"{device_id}: {error}", blamed)
    named = frozenset(holder for holders in wrong.values() for holder in holders)
    lied = frozenset(cohort.members[index].device_id for index in liars(cohort.graph, wrong))
    return Recovered(state.context, cohort, state.survivors, tuple(masks), named, lied)


def _share_check_salt(state: Unmasking) -> bytes:
    """A salt that follows from every share that came, so that nobody could choose one knowing it.

    Fiat and Shamir 1986 (doi 10.1007/3-540-47721-7_12): no randomness of the aggregator's own is needed.
    """
    content = hashlib.sha256()
    for holder, answer in state.answers.items():
        content.update(holder.to_bytes(4, "big") + len(answer.peers).to_bytes(4, "big"))
        content.update(answer.to_body())
    return derive_key(content.digest(), purpose="share-check", context=state.cohort.roster_hash)


def _secret_check(state: Unmasking, index: int) -> Callable[[bytes], bool]:
    """Tells the seed (of a survivor) or mask key (of a dropout) that `index` committed to from garbage."""
    if index in state.survivors:
        name, commitment = state.cohort.roster_hash, state.sharers[index]
        return lambda seed: seed_commitment(seed, name, index) == commitment
    mask_key = state.cohort.members[index].entry.mask_key
    return lambda private: public_key(private) == mask_key
