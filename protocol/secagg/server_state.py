"""What the aggregator knows in each phase of a round: one frozen dataclass a phase."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protocol.columns import INDEX, ShareColumn
from protocol.messages import AdvertiseKeys, RosterEntry
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.graph import quorum
from protocol.secagg.growing import GrowingMap
from protocol.secagg.masking import Mask
from protocol.secagg.parameters import GraphAssumptions, GraphParameters
from protocol.secagg.routing import SealedMail, incoming_edges
from protocol.secagg.subcohorts import WHOLE, Split


@dataclass(frozen=True)
class ServerContext:
    """The round's fixed parameters, from the signed plan and the fleet.

    Attributes:
        invited: device ids that may check in: those of one sub-cohort.
        split: of the plan's cohort.
        certificates: those of earlier rounds, which it adds to.
    """

    fleet: str
    round_id: str
    plan_hash: bytes
    ca: bytes
    invited: frozenset[str]
    minimum_cohort: int
    minimum_survivors: int
    graph: GraphAssumptions
    split: Split = WHOLE
    certificates: CertificateCache = field(default_factory=CertificateCache, repr=False, compare=False)


@dataclass(frozen=True)
class Member:
    """One client of the roster."""

    device_id: str
    identity_key: bytes
    entry: RosterEntry


@dataclass(frozen=True)
class Cohort:
    """The closed roster and the graph that follows from it.

    Attributes:
        members: by roster index.
        neighbours: by roster index.
    """

    roster_hash: bytes
    root: bytes
    graph: GraphParameters
    members: tuple[Member, ...]
    neighbours: tuple[tuple[int, ...], ...]
    index: Mapping[str, int]

    @cached_property
    def entries(self) -> tuple[RosterEntry, ...]:
        """The whole roster, as everybody sees it on the complete graph."""
        return tuple(member.entry for member in self.members)

    @cached_property
    def near(self) -> NDArray[np.uint16]:
        """`neighbours` as they stand in a column; uint16, little-endian, shape (n, k)."""
        return np.array(self.neighbours, INDEX)

    @cached_property
    def edges(self) -> NDArray[np.int64]:
        """Where each client's neighbours have what is for it (`protocol.secagg.routing`)."""
        return incoming_edges(self.near)

    def quorum(self, index: int, present: frozenset[int]) -> bool:
        """Whether the threshold of those who hold shares of `index` is `present`."""
        return quorum(self.graph, index, self.neighbours[index], present)


@dataclass(frozen=True)
class Advertising:
    """Collects check-ins."""

    context: ServerContext
    entries: GrowingMap[str, tuple[AdvertiseKeys, bytes]]
    left: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SharesSent:
    """What one client sent to its neighbours, as small as it gets: a cohort of 10,000 sends half a million.

    Attributes:
        sealed: for each neighbour, ascending: the values of its `SealedColumn`.
    """

    seed_commitment: bytes
    sealed: bytes


@dataclass(frozen=True)
class Sharing:
    """Collects sealed shares."""

    context: ServerContext
    cohort: Cohort
    received: GrowingMap[int, SharesSent]
    left: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Collecting:
    """Collects masked inputs; only clients of `sharers` have masks in common.

    Attributes:
        sharers: roster index -> seed commitment, of those who shared their keys.
        mail: what they sealed for each other.
        stored: roster indices of those whose input is in the sum, each with nothing.
    """

    context: ServerContext
    cohort: Cohort
    sharers: Mapping[int, bytes]
    mail: SealedMail = field(repr=False)
    stored: GrowingMap[int, None] = field(default_factory=GrowingMap)
    left: frozenset[int] = frozenset()

    @property
    def survivors(self) -> Set[int]:
        """Whose inputs are in the sum so far."""
        return self.stored.keys()


@dataclass(frozen=True)
class Checking:
    """Collects signatures on the survivor set.

    Attributes:
        sharers: roster index -> seed commitment, of those who shared their keys.
        members: the survivor set as a bit map.
        survivors_hash: what survivors sign.
    """

    context: ServerContext
    cohort: Cohort
    sharers: Mapping[int, bytes]
    survivors: frozenset[int]
    members: bytes
    survivors_hash: bytes
    signatures: GrowingMap[int, bytes]
    left: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Unmasking:
    """Collects shares of the survivors' seeds and of the dropouts' mask keys.

    Attributes:
        sharers: roster index -> seed commitment, of those who shared their keys.
        answers: who answered -> a share of each secret that it was asked for: a survivor's of the seed, a
            dropout's of the key.
    """

    context: ServerContext
    cohort: Cohort
    sharers: Mapping[int, bytes]
    survivors: frozenset[int]
    signatures: Mapping[int, bytes]
    survivors_hash: bytes
    answers: GrowingMap[int, ShareColumn]
    left: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Recovered:
    """The round's masks are known.

    Attributes:
        survivors: whose inputs are in the sum.
        masks: what to add to the sum of masked inputs to get the sum of inputs.
        misbehaved: clients that sent shares which are not of the secret they belong to; whoever dealt them
            may be to blame.
        liars: device ids of clients that broke the rules for sure (`protocol.secagg.blame`).
    """

    context: ServerContext
    cohort: Cohort
    survivors: frozenset[int]
    masks: tuple[Mask, ...]
    misbehaved: frozenset[int]
    liars: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failed:
    """The round ended without a sum, for a stated reason.

    Attributes:
        liars: as in `Recovered`.
    """

    context: ServerContext
    code: str
    detail: str
    liars: frozenset[str] = frozenset()


ServerState = Advertising | Sharing | Collecting | Checking | Unmasking | Recovered | Failed
