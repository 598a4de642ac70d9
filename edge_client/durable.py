"""What the device's core wants remembered: durable before anything is said. Plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from edge_client.ledger import LedgerEntry
from models.assignment import Assignment
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.secagg.client_state import ClientState
from protocol.version_assignment import VersionAssignment


@dataclass(frozen=True)
class RoundRecord:
    """A round as the disk remembers it.

    Attributes:
        document: the signed plan.
        assignment: what the plan asks.
        client: the protocol state; it holds secrets.
        upload: the masked input, once it is written.
        uploaded: its receipt came.
    """

    document: SignedDocument
    assignment: Assignment
    client: ClientState = field(repr=False)
    upload: BlobRef | None = None
    uploaded: bool = False


@dataclass(frozen=True)
class SaveRound:
    """Remember this round, and for ever that its id was used."""

    record: RoundRecord
    at: int


@dataclass(frozen=True)
class SaveContribution:
    """Enter a contribution into the device's ledger."""

    entry: LedgerEntry


@dataclass(frozen=True)
class CloseRound:
    """Erase the round's secrets and its masked input; its id and outcome stay."""

    round_id: str
    outcome: str
    at: int


@dataclass(frozen=True)
class SaveLocal:
    """From now on these are the device's local parameters of a model; the file is on disk already.

    Attributes:
        layout: digest of their names and shapes (`ModelManifest.local_layout`).
    """

    model: str
    layout: str
    blob: BlobRef


@dataclass(frozen=True)
class PendingUpdate:
    """A clipped update that waits on disk until a buffer collects it, once.

    Attributes:
        document: the signed order that it was trained by.
        plan: its content, verified.
        manifest: of the version that training began from.
        blob: the file (`edge_client.pending_file`).
        at: when it was ready, seconds since 1970.
    """

    document: SignedDocument
    plan: Plan
    manifest: ModelManifest
    blob: BlobRef
    at: int

    @property
    def order(self) -> str:
        """The order's id."""
        return self.plan.round_id


@dataclass(frozen=True)
class SavePending:
    """Remember a pending update, in place of the one of its model before; the file is on disk already."""

    update: PendingUpdate


@dataclass(frozen=True)
class DropPending:
    """The pending update of a model is contributed, or of no use: it must never be contributed (again)."""

    model: str


class VersionStatus(StrEnum):
    """What this device thinks of a version."""

    CANDIDATE = "candidate"
    GOOD = "good"
    BAD = "bad"
    BASE = "base"
    """For rounds: never served unless it is assigned."""


@dataclass(frozen=True)
class SaveVersion:
    """Remember a version and what became of it."""

    document: SignedDocument
    manifest: ModelManifest
    status: VersionStatus
    reason: str = ""


@dataclass(frozen=True)
class SaveStanding:
    """Remember what this device was told to have, so that nothing older is ever taken again.

    Attributes:
        manifest: of the version; None where the assignment names none.
    """

    assignment: VersionAssignment
    document: SignedDocument
    manifest: SignedDocument | None


@dataclass(frozen=True)
class ForgetVersion:
    """A version is neither served nor needed any more."""

    sha256: str


@dataclass(frozen=True)
class StoreChunk:
    """Write one chunk of a download."""

    blob: BlobRef
    index: int
    body: bytes | memoryview


Durable = (
    SaveRound
    | SaveContribution
    | SaveLocal
    | SavePending
    | DropPending
    | CloseRound
    | SaveVersion
    | SaveStanding
    | ForgetVersion
    | StoreChunk
)


DURABLE = (
    SaveRound,
    SaveContribution,
    SaveLocal,
    SavePending,
    DropPending,
    CloseRound,
    SaveVersion,
    SaveStanding,
    ForgetVersion,
    StoreChunk,
)
