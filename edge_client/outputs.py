"""What the device's core wants done: plain values, no behaviour.

The shell carries out the outputs of one event in order: first everything durable (`edge_client.durable`) in
one transaction, then the rest. When the transaction fails, the new state is dropped with it and nothing is
sent, so that the device has never said what it would not remember.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edge_client.durable import Durable
from edge_client.masked_input import Contribution
from edge_client.personalisation import PersonalConfig
from edge_client.training import TrainingConfig
from models.manifest import ModelManifest
from protocol.dp.mechanism import EncodingParameters
from protocol.fields import BlobRef
from protocol.messages import BlobNeed, FromDevice, VersionFailure
from protocol.secagg.masking import Mask


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
class HandOver:
    """Lay an update of the client ready for root's program; looked at again, it shows what became of it.

    Attributes:
        release: JSON of the signed release.
        assignments: JSON of the signed assignments that ask for it.
        blob: the whole bundle; None when its version is installed.
    """

    release: bytes
    assignments: bytes
    blob: BlobRef | None


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


Output = (
    Durable
    | Send
    | SendChunks
    | Announce
    | FindBlob
    | KeepBlobs
    | HandOver
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
NOTHING: Outputs = ()


def note(event: str, **fields: Any) -> Note:
    """An ordinary note for the log."""
    return Note(Level.INFO, event, fields)


def warning(event: str, **fields: Any) -> Note:
    """A note that the device's owner should see."""
    return Note(Level.WARNING, event, fields)
