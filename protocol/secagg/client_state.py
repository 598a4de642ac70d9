"""What a client knows in each phase of a round: one frozen dataclass a phase, and how they are stored.

A state holds just the secrets that its phase still needs; what a later phase must not have is not a field of
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from protocol.columns import SealedColumn
from protocol.fields import BlobRef
from protocol.messages import AdvertiseKeys, ClientAbort, ConsistencySignature, ShareKeys, UnmaskingShares
from protocol.secagg.graph import quorum
from protocol.secagg.key_agreement import load_private
from protocol.secagg.masking import Mask, pairwise_mask, self_mask
from protocol.secagg.parameters import GraphAssumptions, GraphParameters
from protocol.secagg.subcohorts import WHOLE, Split

_STORABLE = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


@dataclass(frozen=True)
class RoundContext:
    """What a client takes from its enrolment and from the signed plan.

    Attributes:
        ca: DER certificate of the fleet CA.
        minimum_cohort: the larger of the plan's and the device's own minimum.
        maximum_cohort: devices of the largest sub-cohort, for which the ring is wide enough.
        minimum_survivors: masked inputs that must be in the sum.
        graph: the plan's assumptions, from which degree and threshold follow.
        split: of the plan's cohort; the roster is one sub-cohort of it.
    """

    __pydantic_config__ = _STORABLE
    fleet: str
    round_id: str
    plan_hash: bytes
    ca: bytes
    device_id: str
    minimum_cohort: int
    maximum_cohort: int
    minimum_survivors: int
    graph: GraphAssumptions
    split: Split = WHOLE


@dataclass(frozen=True)
class RoundKeys:
    """The two fresh key pairs of a round; only the private halves are kept."""

    __pydantic_config__ = _STORABLE
    encryption_private: bytes = field(repr=False)
    mask_private: bytes = field(repr=False)


@dataclass(frozen=True)
class Peer:
    """A verified neighbour."""

    __pydantic_config__ = _STORABLE
    identity_key: bytes
    encryption_key: bytes
    mask_key: bytes


@dataclass(frozen=True)
class Membership:
    """A verified roster as one client sees it.

    Attributes:
        peers: roster index -> neighbour; the client itself is not among them.
    """

    __pydantic_config__ = _STORABLE
    roster_hash: bytes
    graph: GraphParameters
    index: int
    peers: dict[int, Peer]

    def quorum(self, members: frozenset[int]) -> bool:
        """Whether the threshold of those who hold this client's shares is in `members`."""
        return quorum(self.graph, self.index, self.peers, members)

    @property
    def holders(self) -> tuple[int, ...]:
        """Who gets shares of this client's secrets, ascending."""
        return tuple(sorted({*self.peers, self.index} if self.graph.complete else self.peers))


@dataclass(frozen=True)
class OwnSecrets:
    """The self-mask seed, and what gives the shares away.

    Attributes:
        seed_share: the client's own share of it, which it holds on the complete graph only.
        opening_keys: roster index -> key that opens what this neighbour sealed.
    """

    __pydantic_config__ = _STORABLE
    seed: bytes = field(repr=False)
    seed_share: bytes | None = field(repr=False)
    opening_keys: dict[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Advertised:
    """Phase AdvertiseKeys: checked in, waiting for the roster."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    keys: RoundKeys
    answer: AdvertiseKeys


@dataclass(frozen=True)
class SharesSent:
    """Phase ShareKeys: shares sent, waiting for those of the neighbours."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    mask_private: bytes = field(repr=False)
    membership: Membership
    secrets: OwnSecrets
    answer: ShareKeys


@dataclass(frozen=True)
class Masking:
    """Phase MaskedInput: the masks are known, the input is not masked yet.

    Attributes:
        delivered: the sealed shares of each neighbour that shared its keys. Masks are made with these and no
            others.
    """

    __pydantic_config__ = _STORABLE
    context: RoundContext
    mask_private: bytes = field(repr=False)
    membership: Membership
    secrets: OwnSecrets
    delivered: SealedColumn

    def masks(self) -> tuple[Mask, ...]:
        """The self-mask and one pairwise mask for each neighbour that shared its keys."""
        own, roster_hash = self.membership.index, self.membership.roster_hash
        private = load_private(self.mask_private)
        return (
            self_mask(self.secrets.seed, roster_hash, own),
            *(
                pairwise_mask(private, self.membership.peers[peer].mask_key, roster_hash, own, peer)
                for peer in self.delivered.indices()
            ),
        )


@dataclass(frozen=True)
class InputSent:
    """Phase MaskedInput: the masked input is on disk and on its way; the masks cannot be made again."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    membership: Membership
    secrets: OwnSecrets
    delivered: SealedColumn
    masked_input: BlobRef


@dataclass(frozen=True)
class SetSigned:
    """Phase ConsistencyCheck: signed one survivor set."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    membership: Membership
    secrets: OwnSecrets
    delivered: SealedColumn
    survivors: bytes
    answer: ConsistencySignature


@dataclass(frozen=True)
class Unmasked:
    """Phase Unmasking: answered, once and for all."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    answer: UnmaskingShares


@dataclass(frozen=True)
class Ended:
    """The round is over; nothing secret is left."""

    __pydantic_config__ = _STORABLE
    context: RoundContext


@dataclass(frozen=True)
class Aborted:
    """The client left the round; nothing secret is left."""

    __pydantic_config__ = _STORABLE
    context: RoundContext
    answer: ClientAbort


ClientState = Advertised | SharesSent | Masking | InputSent | SetSigned | Unmasked | Ended | Aborted
PHASES: dict[str, type[Any]] = {
    phase.__name__: phase
    for phase in (Advertised, SharesSent, Masking, InputSent, SetSigned, Unmasked, Ended, Aborted)
}


@cache
def _schema(phase: str) -> TypeAdapter[Any]:
    # Making one takes longer than a signature, and a megabyte for a moment.
    return TypeAdapter(PHASES[phase])


def dump_state(state: ClientState) -> tuple[str, bytes]:
    """Returns (phase name, JSON) for the device's durable store. It holds secrets."""
    phase = type(state).__name__
    return phase, _schema(phase).dump_json(state)


def load_state(phase: str, data: bytes) -> ClientState:
    """Restores what `dump_state` made."""
    state: ClientState = _schema(phase).validate_json(data)
    return state
