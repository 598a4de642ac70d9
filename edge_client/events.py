"""What reaches the device's core, one event at a time: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_client.installed import Sight
from edge_client.masked_input import Contribution
from edge_client.personalisation import PersonalRecord
from edge_client.training import Evaluation, LocalUpdate
from protocol.fields import BlobRef
from protocol.messages import ToDevice


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
class ClientSeen:
    """What is installed of the client itself; None where it cannot be changed by itself."""

    sight: Sight | None


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
    | ClientSeen
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
