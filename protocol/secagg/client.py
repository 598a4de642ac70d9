"""The client's side of a round, as a state machine that distrusts the aggregator.

Theory of operation. A state is one frozen dataclass a phase; `handle(state, event)` returns the next state
and the message to send, if any. The table `TRANSITIONS` is the whole machine:

    Advertised  --RosterReceived-->     SharesSent    answers ShareKeys (private encryption key erased)
    SharesSent  --SharesReceived-->     Masking       (the masks are known from here on)
    Masking     --InputMasked-->        InputSent     (private mask key erased)
    InputSent   --SurvivorsReceived-->  SetSigned     answers ConsistencySignature
    SetSigned   --UnmaskRequested-->    Unmasked      answers UnmaskingShares (every other secret erased)
    any         --RoundEnded-->         Ended         (secrets erased)
    any         --rule broken-->        Aborted       answers ClientAbort (secrets erased)

A repeated event gets the stored answer again; an event that contradicts what was answered aborts; an event
that comes too early raises IllegalEvent and changes nothing. So the caller may persist the new state, send,
crash and start again at any point without ever answering twice differently.

Protocol: Bonawitz et al. 2017 (ePrint 2017/281, Fig. 4, active adversaries), on the graph of Bell et al. 2020
(ePrint 2020/704).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.columns import SealedColumn, ShareColumn
from protocol.errors import BadSignature, IllegalEvent, MalformedMessage, RoundViolation
from protocol.fields import BlobRef
from protocol.identity import sign, verify
from protocol.messages import (
    AdvertiseKeys,
    ClientAbort,
    ConsistencySignature,
    Roster,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    UnmaskingShares,
    UnmaskRequest,
)
from protocol.secagg import roster as rosters
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.client_state import (
    Aborted,
    Advertised,
    ClientState,
    Ended,
    InputSent,
    Masking,
    OwnSecrets,
    RoundContext,
    RoundKeys,
    SetSigned,
    SharesSent,
    Unmasked,
)
from protocol.secagg.key_agreement import load_private, public_key
from protocol.secagg.masking import seed_commitment
from protocol.secagg.prg import Keystream, derive_key
from protocol.secagg.roster_check import require, verify_roster
from protocol.secagg.sealed_shares import channel, seal, unseal
from protocol.secagg.shamir import split

Answer = ShareKeys | ConsistencySignature | UnmaskingShares | ClientAbort | None

# --- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RosterReceived:
    """The roster came.

    Attributes:
        entropy: 32 fresh random bytes.
        now: seconds since 1970, for the certificates.
        certificates: those of earlier rounds, which it adds to.
    """

    message: Roster
    entropy: bytes = field(repr=False)
    now: int
    certificates: CertificateCache = field(default_factory=CertificateCache, repr=False, compare=False)


@dataclass(frozen=True)
class SharesReceived:
    """The neighbours' sealed shares came."""

    message: ShareDelivery


@dataclass(frozen=True)
class InputMasked:
    """The masked input is durably stored, under this name."""

    masked_input: BlobRef


@dataclass(frozen=True)
class SurvivorsReceived:
    """The survivor set came; `identity` signs it."""

    message: SurvivorSet
    identity: Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True)
class UnmaskRequested:
    """The quorum of signatures came."""

    message: UnmaskRequest


@dataclass(frozen=True)
class RoundEnded:
    """The aggregator says that the round is over, or its time is."""


Event = RosterReceived | SharesReceived | InputMasked | SurvivorsReceived | UnmaskRequested | RoundEnded


# --- the machine -----------------------------------------------------------------------------------------


def begin(
    context: RoundContext, certificate: bytes, identity: Ed25519PrivateKey, entropy: bytes
) -> Advertised:
    """Checks in for a round: makes its keys and signs them.

    Args:
        context: from enrolment and the signed plan.
        certificate: the device's own, DER.
        identity: the device's private key.
        entropy: 32 fresh random bytes, used for this round only.
    """
    keys = RoundKeys(
        encryption_private=derive_key(entropy, purpose="encryption-private"),
        mask_private=derive_key(entropy, purpose="mask-private"),
    )
    encryption_key, mask_key = public_key(keys.encryption_private), public_key(keys.mask_private)
    payload = rosters.advertisement_payload(
        context.fleet, context.round_id, context.plan_hash, encryption_key, mask_key
    )
    answer = AdvertiseKeys(
        round_id=context.round_id,
        certificate=certificate,
        encryption_key=encryption_key,
        mask_key=mask_key,
        signature=sign(identity, rosters.ADVERTISE_KIND, payload),
    )
    return Advertised(context, keys, answer)


def handle(state: ClientState, event: Event) -> tuple[ClientState, Answer]:
    """Applies one event; returns the new state and what to send.

    Raises:
        IllegalEvent: this phase has no rule for the event; nothing changed.
    """
    if isinstance(state, Ended | Aborted):
        return state, state.answer if isinstance(state, Aborted) and not isinstance(
            event, RoundEnded
        ) else None
    if isinstance(event, RoundEnded):
        return Ended(state.context), None
    rule = TRANSITIONS.get((type(state), type(event)))
    if rule is None:
        raise IllegalEvent(f"{type(event).__name__} in phase {type(state).__name__}")
    try:
        new_state, answer = rule.apply(state, event)
    except RoundViolation as violation:
        return abort(state, violation)
    except (BadSignature, MalformedMessage) as error:
        code = "bad-signature" if isinstance(error, BadSignature) else "malformed"
        return abort(state, RoundViolation(code, str(error)))
    if not isinstance(new_state, rule.leads_to):
        raise AssertionError(f"{type(new_state).__name__} where {rule.leads_to.__name__} was due")
    return new_state, answer


def abort(state: ClientState, violation: RoundViolation) -> tuple[Aborted, ClientAbort]:
    """Leaves the round and erases its secrets."""
    answer = ClientAbort(round_id=state.context.round_id, code=violation.code, detail=violation.detail[:300])
    return Aborted(state.context, answer), answer


def _share_keys(state: Advertised, event: RosterReceived) -> tuple[ClientState, Answer]:
    membership = verify_roster(state.context, state.answer, event.message, event.now, event.certificates)
    seed = derive_key(event.entropy, purpose="self-mask-seed")
    holders = membership.holders
    points = [holder + 1 for holder in holders]
    threshold = membership.graph.threshold
    key_shares, seed_shares = (
        dict(
            zip(
                holders,
                split(
                    secret, threshold, points, Keystream(derive_key(event.entropy, purpose=f"shamir-{name}"))
                ),
                strict=True,
            )
        )
        for name, secret in (("key", state.keys.mask_private), ("seed", seed))
    )
    own, name = membership.index, membership.roster_hash
    private = load_private(state.keys.encryption_private)
    sealed, opening_keys = {}, {}
    for peer in sorted(membership.peers):
        keys = channel(private, membership.peers[peer].encryption_key, name, own, peer)
        sealed[peer] = seal(keys.sealing, name, own, peer, (key_shares[peer], seed_shares[peer]))
        opening_keys[peer] = keys.opening
    answer = ShareKeys(
        round_id=state.context.round_id,
        roster_hash=name,
        seed_commitment=seed_commitment(seed, name, own),
        shares=SealedColumn.of(sealed),
    )
    secrets = OwnSecrets(seed, seed_shares.get(own), opening_keys)
    return SharesSent(state.context, state.keys.mask_private, membership, secrets, answer), answer


def _receive_shares(state: SharesSent, event: SharesReceived) -> tuple[ClientState, Answer]:
    membership, message = state.membership, event.message
    require(message.roster_hash == membership.roster_hash, "split-view", "shares of another roster")
    senders = frozenset(message.shares.indices())
    require(senders <= membership.peers.keys(), "unknown-peer", "shares of a stranger")
    require(
        membership.quorum(senders | {membership.index}),
        "too-few-shares",
        f"only {len(senders)} neighbours shared their keys",
    )
    return Masking(state.context, state.mask_private, membership, state.secrets, message.shares), None


def _send_input(state: Masking, event: InputMasked) -> tuple[ClientState, Answer]:
    return (
        InputSent(
            state.context,
            state.membership,
            state.secrets,
            state.delivered,
            event.masked_input,
        ),
        None,
    )


def _sign_set(state: InputSent, event: SurvivorsReceived) -> tuple[ClientState, Answer]:
    membership, context = state.membership, state.context
    survivors = rosters.members_from_bytes(event.message.survivors, membership.graph.size)
    require(membership.index in survivors, "listed-dropped", "this client is listed as dropped itself")
    require(
        len(survivors) >= context.minimum_survivors,
        "too-few-survivors",
        f"{len(survivors)} survivors where the plan promises {context.minimum_survivors}",
    )
    require(membership.quorum(survivors), "too-few-survivors", "fewer neighbours survive than the threshold")
    require(
        survivors & membership.peers.keys() <= frozenset(state.delivered.indices()),
        "unknown-survivor",
        "a neighbour that shared no keys is listed as survivor",
    )
    name = rosters.survivors_hash(membership.roster_hash, event.message.survivors)
    answer = ConsistencySignature(
        round_id=context.round_id,
        survivors_hash=name,
        signature=sign(event.identity, rosters.SURVIVORS_KIND, name),
    )
    return (
        SetSigned(
            context,
            membership,
            state.secrets,
            state.delivered,
            event.message.survivors,
            answer,
        ),
        answer,
    )


def _unmask(state: SetSigned, event: UnmaskRequested) -> tuple[ClientState, Answer]:
    membership, message = state.membership, event.message
    name = state.answer.survivors_hash
    require(message.survivors_hash == name, "split-view", "asked to unmask another set than the one signed")
    survivors = rosters.members_from_bytes(state.survivors, membership.graph.size)
    signers = message.signatures.by_peer()
    strangers = signers.keys() - (survivors & membership.peers.keys()) - {membership.index}
    require(not strangers, "unknown-signer", "a signature of someone who is no surviving neighbour")
    require(
        membership.quorum(frozenset(signers) | {membership.index}),
        "no-quorum",
        f"{len(signers)} signatures where {membership.graph.threshold} are needed",
    )
    for peer, signature in signers.items():
        if peer != membership.index:
            key = Ed25519PublicKey.from_public_bytes(membership.peers[peer].identity_key)
            verify(key, rosters.SURVIVORS_KIND, name, signature)
    own_share = state.secrets.seed_share
    shares = {} if own_share is None else {membership.index: own_share}
    for peer, sealed in state.delivered.by_peer().items():
        try:
            key_share, seed_share = unseal(
                state.secrets.opening_keys[peer], membership.roster_hash, peer, membership.index, sealed
            )
        except BadSignature:
            # A peer that sealed garbage must not stop the round: the other holders' shares suffice.
            continue
        # There is room for one share of a peer, and none for both.
        shares[peer] = seed_share if peer in survivors else key_share
    answer = UnmaskingShares(
        round_id=state.context.round_id, survivors_hash=name, shares=ShareColumn.of(shares)
    )
    return Unmasked(state.context, answer), answer


# --- repeated events: the stored answer again, or an abort ------------------------------------------------


def _same_roster(state: SharesSent, event: RosterReceived) -> tuple[ClientState, Answer]:
    _check_same_roster(state, event)
    return state, state.answer


def _old_roster(state: Masking | InputSent | SetSigned, event: RosterReceived) -> tuple[ClientState, Answer]:
    _check_same_roster(state, event)
    return state, None


def _check_same_roster(state: SharesSent | Masking | InputSent | SetSigned, event: RosterReceived) -> None:
    name = rosters.roster_hash(
        state.context.round_id, state.context.plan_hash, event.message.size, event.message.root
    )
    require(name == state.membership.roster_hash, "split-view", "a second roster in one round")


def _same_delivery(
    state: Masking | InputSent | SetSigned, event: SharesReceived
) -> tuple[ClientState, Answer]:
    message = event.message
    same = message.roster_hash == state.membership.roster_hash and message.shares == state.delivered
    require(same, "split-view", "a second delivery of shares that differs from the first")
    return state, None


def _same_survivors(state: SetSigned, event: SurvivorsReceived) -> tuple[ClientState, Answer]:
    require(event.message.survivors == state.survivors, "split-view", "a second, different survivor set")
    return state, state.answer


def _same_unmasking(state: Unmasked, event: UnmaskRequested) -> tuple[ClientState, Answer]:
    same = event.message.survivors_hash == state.answer.survivors_hash
    require(same, "split-view", "asked to unmask a second, different set")
    return state, state.answer


def _nothing(state: Unmasked, event: Event) -> tuple[ClientState, Answer]:
    return state, None


@dataclass(frozen=True)
class Rule:
    """One row of the machine: what a phase does with an event, and which phase follows unless it aborts."""

    leads_to: type[ClientState]
    apply: Callable[[Any, Any], tuple[ClientState, Answer]]


TRANSITIONS: dict[tuple[type, type], Rule] = {
    (Advertised, RosterReceived): Rule(SharesSent, _share_keys),
    (SharesSent, RosterReceived): Rule(SharesSent, _same_roster),
    (SharesSent, SharesReceived): Rule(Masking, _receive_shares),
    (Masking, RosterReceived): Rule(Masking, _old_roster),
    (Masking, SharesReceived): Rule(Masking, _same_delivery),
    (Masking, InputMasked): Rule(InputSent, _send_input),
    (InputSent, RosterReceived): Rule(InputSent, _old_roster),
    (InputSent, SharesReceived): Rule(InputSent, _same_delivery),
    (InputSent, SurvivorsReceived): Rule(SetSigned, _sign_set),
    (SetSigned, RosterReceived): Rule(SetSigned, _old_roster),
    (SetSigned, SharesReceived): Rule(SetSigned, _same_delivery),
    (SetSigned, SurvivorsReceived): Rule(SetSigned, _same_survivors),
    (SetSigned, UnmaskRequested): Rule(Unmasked, _unmask),
    (Unmasked, RosterReceived): Rule(Unmasked, _nothing),
    (Unmasked, SharesReceived): Rule(Unmasked, _nothing),
    (Unmasked, SurvivorsReceived): Rule(Unmasked, _nothing),
    (Unmasked, UnmaskRequested): Rule(Unmasked, _same_unmasking),
}
"""The whole machine; the diagram in the documentation is drawn from it."""
