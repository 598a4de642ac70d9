"""What reaches the device's core, and what it wants done: plain values, no behaviour.

The shell applies one event at a time. It carries out the outputs in order: first everything durable
(`DURABLE`) in one transaction, then the rest. When the transaction fails, the new state is dropped with it
and nothing is sent, so that the device has never said what it would not remember.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.ledger import LedgerEntry
from edge_client.personalisation import PersonalConfig, PersonalRecord
from edge_client.training import Evaluation, LocalUpdate, TrainingConfig
from models.assignment import Assignment
from models.manifest import ModelManifest
from protocol.dp.mechanism import EncodingParameters
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import BlobNeed, FromDevice, ToDevice, VersionFailure
from protocol.plan import Plan
from protocol.secagg.client_state import ClientState
from protocol.secagg.masking import Mask
from protocol.version_assignment import VersionAssignment


@dataclass(frozen=True)
class Stamp:
    """Time and entropy of one event: the core has neither of its own.

    Attributes:
        unix: seconds since 1970, for what is signed; a Pi's clock may jump.
        steady: seconds of a clock that never jumps, for repetition.
        entropy: 32 fresh random bytes.
    """

    unix: int
    steady: float
    entropy: bytes = field(repr=False)


@dataclass(frozen=True)
class Fault:
    """Why something did not work: a stable word, and a sentence without secrets or data.

    Attributes:
        transient: the cause is this device's state (a full disk), not what it was given.
    """

    code: str
    detail: str
    transient: bool = False


# --- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The process is up, with the state that the last one left."""


@dataclass(frozen=True)
class Connected:
    """The broker has this device again; messages may have been lost meanwhile."""


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True)
class MessageReceived:
    """A well-formed message of the aggregator, with the body of a chunk."""

    message: ToDevice
    body: bytes | memoryview = b""


@dataclass(frozen=True)
class ConditionsChanged:
    """Whether this device can take part in a round at all right now, and why not."""

    fault: Fault | None


@dataclass(frozen=True)
class FieldsDeclared:
    """The fields that this device's owner lets queries ask for, by name."""

    fields: frozenset[str]


@dataclass(frozen=True)
class BlobFound:
    """What the disk holds of a blob: all of it, or these chunks."""

    blob: BlobRef
    complete: bool
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True)
class VersionTested:
    """A version was loaded and run, or could not be."""

    sha256: str
    fault: Fault | None


@dataclass(frozen=True)
class VersionFailed:
    """A version that had passed its test failed in use."""

    sha256: str
    fault: Fault


@dataclass(frozen=True)
class TrainingFinished:
    """Local training gave an update."""

    round_id: str
    update: LocalUpdate


@dataclass(frozen=True)
class UpdatePrepared:
    """An update trained by a standing order is on disk, fsynced."""

    model: str
    order: str
    blob: BlobRef


@dataclass(frozen=True)
class PreparationFailed:
    """Training by a standing order failed."""

    model: str
    order: str
    fault: Fault


@dataclass(frozen=True)
class UpdateRead:
    """The pending update that a buffer collects was read."""

    round_id: str
    contribution: Contribution = field(repr=False)


@dataclass(frozen=True)
class Evaluated:
    """A version was evaluated on this device's examples."""

    round_id: str
    evaluation: Evaluation = field(repr=False)


@dataclass(frozen=True)
class FieldRead:
    """The field that a query asks for was read."""

    round_id: str
    value: float = field(repr=False)


@dataclass(frozen=True)
class InputWritten:
    """The packed masked input is on disk, fsynced, and so are the local parameters that go with it."""

    round_id: str
    blob: BlobRef
    local: BlobRef | None = None


@dataclass(frozen=True)
class Personalised:
    """A version was fine-tuned on this device, or could not be; the device goes on either way."""

    model: str
    result: PersonalRecord | Fault
    sha256: str


@dataclass(frozen=True)
class WorkFailed:
    """Training, reading a field, masking or reading the masked input failed."""

    round_id: str
    fault: Fault


Event = (
    Started
    | Connected
    | Ticked
    | MessageReceived
    | ConditionsChanged
    | FieldsDeclared
    | BlobFound
    | VersionTested
    | VersionFailed
    | TrainingFinished
    | UpdatePrepared
    | PreparationFailed
    | UpdateRead
    | Evaluated
    | FieldRead
    | InputWritten
    | Personalised
    | WorkFailed
)


# --- outputs that are durable before anything is sent ------------------------------------------------------


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


# --- outputs that follow ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send a message to the aggregator."""

    message: FromDevice


@dataclass(frozen=True)
class SendChunks:
    """Answer with these chunks of the round's masked input."""

    round_id: str
    need: BlobNeed


@dataclass(frozen=True)
class Announce:
    """Publish this device's status: the versions that it answers predictions with, and those that failed."""

    models: Mapping[str, int]
    failures: Mapping[str, VersionFailure] = field(default_factory=dict)


@dataclass(frozen=True)
class FindBlob:
    """Look what the disk holds of a blob; when every chunk is there, check its digest first.

    The answer is `BlobFound`. A complete download with a wrong digest is thrown away: nothing of it is found.
    """

    blob: BlobRef


@dataclass(frozen=True)
class KeepBlobs:
    """Delete every stored blob, whole or partial, that is not among these."""

    digests: frozenset[str]


@dataclass(frozen=True)
class TestVersion:
    """Load a version and run it once; the answer is `VersionTested`."""

    __test__ = False  # not one of pytest's
    sha256: str
    manifest: ModelManifest


@dataclass(frozen=True)
class Train:
    """Train on this device's examples; the answer is `TrainingFinished` or `WorkFailed`.

    Attributes:
        local: the device's local parameters; None where the model has none, or they start anew.
    """

    round_id: str
    manifest: ModelManifest
    config: TrainingConfig
    local: BlobRef | None = None


@dataclass(frozen=True)
class PrepareUpdate:
    """Train by a standing order, clip, and write the update; `UpdatePrepared` or `PreparationFailed` answers.

    Attributes:
        clip_norm: of the order.
        local: as in `Train`.
    """

    order: str
    manifest: ModelManifest
    config: TrainingConfig
    clip_norm: float
    local: BlobRef | None = None


@dataclass(frozen=True)
class ReadUpdate:
    """Read a pending update; the answer is `UpdateRead` or `WorkFailed`."""

    round_id: str
    blob: BlobRef


@dataclass(frozen=True)
class Evaluate:
    """Run a version on this device's examples; the answer is `Evaluated` or `WorkFailed`.

    Attributes:
        local: the device's local parameters; None where the model has none, or they start anew.
    """

    round_id: str
    manifest: ModelManifest
    local: BlobRef | None = None


@dataclass(frozen=True)
class ReadField:
    """Read a declared field; the answer is `FieldRead` or `WorkFailed`."""

    round_id: str
    field: str


@dataclass(frozen=True)
class Contribution:
    """What this device adds to the sum, before clipping, noise and masking. It never leaves it as is.

    Attributes:
        vector: an update or an answer, finite float32, shape (d,).
        metrics: the metrics that there are, by name.
        local: the parameters that stay here after training, if the model has any.
    """

    vector: NDArray[np.float32]
    metrics: Mapping[str, float]
    local: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class MaskInput:
    """Encode, mask and write the contribution; the answer is `InputWritten` or `WorkFailed`.

    Attributes:
        noise_key: secret randomness of rounding and noise, used once.
    """

    round_id: str
    contribution: Contribution = field(repr=False)
    encoding: EncodingParameters
    masks: tuple[Mask, ...] = field(repr=False)
    noise_key: bytes = field(repr=False)


@dataclass(frozen=True)
class Personalise:
    """Fine-tune a version on this device's examples; the answer is `Personalised`.

    Attributes:
        local: as in `Train`.
    """

    manifest: ModelManifest
    config: PersonalConfig
    local: BlobRef | None = None


class Level(StrEnum):
    """How much a note matters to the device's owner."""

    INFO = "info"
    WARNING = "warning"


@dataclass(frozen=True)
class Note:
    """Something for the log. It holds no secret."""

    level: Level
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


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
Output = (
    Durable
    | Send
    | SendChunks
    | Announce
    | FindBlob
    | KeepBlobs
    | TestVersion
    | Train
    | PrepareUpdate
    | ReadUpdate
    | Evaluate
    | ReadField
    | MaskInput
    | Personalise
    | Note
)
Outputs = tuple[Output, ...]


def note(event: str, **fields: Any) -> Note:
    """An ordinary note for the log."""
    return Note(Level.INFO, event, fields)


def warning(event: str, **fields: Any) -> Note:
    """A note that the device's owner should see."""
    return Note(Level.WARNING, event, fields)
