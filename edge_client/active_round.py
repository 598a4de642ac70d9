"""The round that this device is in: what it knows of it, how it says so again, and how it leaves it."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_client.durable import CloseRound, RoundRecord, SaveRound
from edge_client.events import Fault, Stamp
from edge_client.masked_input import Contribution
from edge_client.outputs import Outputs, Send, note, warning
from models.assignment import Assignment
from protocol.dp.mechanism import EncodingParameters
from protocol.errors import RoundViolation
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import FromDevice, UploadOffer
from protocol.plan import Plan
from protocol.round_encoding import round_encoding
from protocol.secagg import client as secagg
from protocol.secagg.client_state import (
    Aborted,
    Advertised,
    ClientState,
    InputSent,
    SetSigned,
    SharesSent,
    Unmasked,
)

OFFER_SECONDS = 1.0


@dataclass(frozen=True)
class Unstarted:
    """Nothing to mask yet; work starts when shares are sent and what it needs is there."""


@dataclass(frozen=True)
class WorkingNow:
    """The worker trains, evaluates, or reads the field."""


@dataclass(frozen=True)
class Worked:
    """The contribution waits for the masks."""

    contribution: Contribution = field(repr=False)


@dataclass(frozen=True)
class MaskingNow:
    """The worker encodes, masks and writes."""


Work = Unstarted | WorkingNow | Worked | MaskingNow


@dataclass(frozen=True)
class ActiveRound:
    """The round that this device is in.

    Attributes:
        document: the signed plan.
        plan: its content, verified.
        assignment: what the plan asks of this device.
        client: the protocol state.
        upload: the masked input, once it is durably stored.
        uploaded: its receipt came.
        work: training or reading, and masking, in this process.
        offer_at: when to offer the upload next, on the steady clock.
        patience: seconds between offers.
    """

    document: SignedDocument
    plan: Plan
    assignment: Assignment
    client: ClientState
    upload: BlobRef | None = None
    uploaded: bool = False
    work: Work = Unstarted()
    offer_at: float = 0.0
    patience: float = OFFER_SECONDS

    @property
    def round_id(self) -> str:
        """The round's id."""
        return self.plan.round_id

    @property
    def encoding(self) -> EncodingParameters:
        """How this device's vector becomes one of the ring; a function of plan and manifest."""
        return round_encoding(self.plan, self.document.digest, self.assignment.dimension)


Step = tuple[ActiveRound | None, Outputs]
"""The round afterwards, None when the device left it, and what to do."""


def restore(record: RoundRecord) -> ActiveRound:
    """The round that an earlier process left; `advance` and `tick` take it up."""
    plan = Plan.from_bytes(record.document.payload)
    return ActiveRound(
        record.document, plan, record.assignment, record.client, record.upload, record.uploaded
    )


def answer_of(active: ActiveRound) -> FromDevice | None:
    """What this device said last, to be said again; the receiver takes each answer once."""
    client = active.client
    if isinstance(client, Advertised | SharesSent | SetSigned | Unmasked | Aborted):
        return client.answer
    if isinstance(client, InputSent) and not active.uploaded:
        return UploadOffer(round_id=active.round_id, blob=client.masked_input)
    return None


def abort(active: ActiveRound, fault: Fault, stamp: Stamp) -> Step:
    """Leaves the round because this device cannot go on, and says so."""
    if isinstance(active.client, InputSent | SetSigned | Unmasked) and active.uploaded:
        # What is uploaded is complete; only the answers are still owed, and they need no work.
        return active, ()
    client, _ = secagg.abort(active.client, RoundViolation(fault.code, fault.detail))
    return leave(client, stamp)


def close(active: ActiveRound, outcome: str, stamp: Stamp) -> Step:
    """Forgets everything about the round but its id and how it went."""
    return None, (
        CloseRound(active.round_id, outcome, stamp.unix),
        note("round-closed", round=active.round_id, outcome=outcome),
    )


def leave(client: Aborted, stamp: Stamp) -> Step:
    """Forgets a round that the protocol has aborted here, and says why."""
    round_id, answer = client.context.round_id, client.answer
    return None, (
        CloseRound(round_id, f"aborted: {answer.code}", stamp.unix),
        warning("round-aborted", round=round_id, code=answer.code, detail=answer.detail),
        Send(answer),
    )


def save(active: ActiveRound, stamp: Stamp) -> SaveRound:
    """Remembers the round as it is now."""
    record = RoundRecord(active.document, active.assignment, active.client, active.upload, active.uploaded)
    return SaveRound(record, stamp.unix)
