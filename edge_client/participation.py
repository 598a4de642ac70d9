"""One round as this device lives it, from its check-in to the erasure of its secrets.

Around the protocol's own state machine (`protocol.secagg.client`) this adds what that one cannot know: when
to train, to evaluate or to read a field, when to mask, and that an upload is offered until its receipt comes.

    Advertised --Roster--> SharesSent --ShareDelivery--> Masking --> InputSent --> SetSigned --> Unmasked
                               |                            |           |
                       work starts here        masked when done    offered until the receipt

Work (training, evaluating, or reading a field) and masking live in memory only: after a restart they begin
anew, which nobody can see, because the first masked input that is durably stored is the only one that is ever
offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import assert_never

from edge_client.durable import CloseRound, DropPending, RoundRecord, SaveContribution, SaveLocal, SaveRound
from edge_client.events import Fault, Stamp
from edge_client.ledger import LedgerEntry
from edge_client.library import Library
from edge_client.masked_input import Contribution, contribution_of, weighted
from edge_client.outputs import (
    Evaluate,
    MaskInput,
    Outputs,
    ReadField,
    ReadUpdate,
    Send,
    SendChunks,
    Train,
    note,
    warning,
)
from edge_client.profile import Profile
from edge_client.training import Evaluation, HiddenExamples, LocalUpdate, TrainingConfig
from models.assignment import Answering, Assignment, Evaluating, Training, described
from protocol.dp.example import example_mechanism
from protocol.dp.mechanism import EncodingParameters
from protocol.dp.parameters import PrivacyParameters
from protocol.errors import IllegalEvent, RoundViolation
from protocol.evaluation import NonFiniteFigure, evaluation_vector
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import (
    BlobNeed,
    FromDevice,
    Roster,
    ShareDelivery,
    SurvivorSet,
    UnmaskRequest,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import Plan, staleness_weight
from protocol.queries import NonFiniteValue, answer_vector
from protocol.round_encoding import contribution_event, round_encoding
from protocol.secagg import client as secagg
from protocol.secagg.client_state import (
    Aborted,
    Advertised,
    ClientState,
    InputSent,
    Masking,
    RoundContext,
    SetSigned,
    SharesSent,
    Unmasked,
)
from protocol.secagg.prg import derive_key

OFFER_SECONDS = 1.0
MAX_OFFER_SECONDS = 15.0

RoundRequest = Roster | ShareDelivery | SurvivorSet | UnmaskRequest


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


def check_in(
    profile: Profile, document: SignedDocument, plan: Plan, assignment: Assignment, stamp: Stamp
) -> tuple[ActiveRound, Outputs]:
    """Joins a round whose plan was verified and agreed to."""
    context = RoundContext(
        fleet=profile.fleet,
        round_id=plan.round_id,
        plan_hash=document.digest,
        ca=profile.ca,
        device_id=profile.device_id,
        minimum_cohort=max(plan.cohort.minimum, profile.policy.minimum_cohort),
        maximum_cohort=plan.cohort.split.largest,
        minimum_survivors=max(plan.cohort.minimum_survivors, profile.policy.minimum_survivors),
        graph=plan.cohort.graph,
        split=plan.cohort.split,
    )
    entropy = derive_key(stamp.entropy, purpose="edge/check-in")
    client = secagg.begin(context, profile.certificate, profile.identity, entropy)
    active = ActiveRound(document, plan, assignment, client)
    return active, (
        _save(active, stamp),
        note("checked-in", round=plan.round_id, task=described(plan.task)),
        Send(client.answer),
    )


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


def request_received(
    active: ActiveRound, profile: Profile, library: Library, message: RoundRequest, stamp: Stamp
) -> Step:
    """A request of the protocol came: answer, abort, or ignore what comes too early."""
    event: secagg.Event
    if isinstance(message, Roster):
        entropy = derive_key(stamp.entropy, purpose="edge/share-keys")
        event = secagg.RosterReceived(message, entropy, stamp.unix, profile.certificates)
    elif isinstance(message, ShareDelivery):
        event = secagg.SharesReceived(message)
    elif isinstance(message, SurvivorSet):
        event = secagg.SurvivorsReceived(message, profile.identity)
    else:
        event = secagg.UnmaskRequested(message)
    try:
        client, answer = secagg.handle(active.client, event)
    except IllegalEvent as error:
        # Reordered, or repeated after a restart: the aggregator asks again when it is its turn.
        return active, (note("message-too-early", round=active.round_id, detail=str(error)),)
    if isinstance(client, Aborted):
        return _leave(client, stamp)
    outputs: Outputs = (Send(answer),) if answer is not None else ()
    if client is active.client:
        return active, outputs
    before, active = type(active.client).__name__, replace(active, client=client)
    moved = note("phase", round=active.round_id, before=before, now=type(client).__name__)
    following, more = advance(active, library, stamp)
    return following, (_save(active, stamp), moved, *outputs, *more)


def advance(active: ActiveRound, library: Library, stamp: Stamp) -> Step:
    """Starts whatever work can start now: training, evaluating, reading a field, or masking."""
    if not isinstance(active.client, SharesSent | Masking):
        return active, ()
    if isinstance(active.work, Unstarted):
        if isinstance(active.assignment, Training) and active.assignment.task.order is not None:
            return _begin_on_pending(active, active.assignment, library, stamp)
        if isinstance(active.assignment, Training | Evaluating):
            return _begin_on_version(active, active.assignment, library, stamp)
        if isinstance(active.assignment, Answering):
            reading = ReadField(active.round_id, active.assignment.task.field)
            return replace(active, work=WorkingNow()), (reading,)
        assert_never(active.assignment)
    if isinstance(active.work, Worked) and isinstance(active.client, Masking):
        masking = MaskInput(
            active.round_id,
            active.work.contribution,
            active.encoding,
            active.client.masks(),
            derive_key(stamp.entropy, purpose="edge/noise"),
        )
        return replace(active, work=MaskingNow()), (masking,)
    return active, ()


def _begin_on_version(
    active: ActiveRound, assignment: Training | Evaluating, library: Library, stamp: Stamp
) -> Step:
    model, digest = assignment.task.model, assignment.manifest.sha256()
    if library.ready(model, digest):
        local = library.local(assignment.manifest)
        job = (
            Evaluate(active.round_id, assignment.manifest, local)
            if isinstance(assignment, Evaluating)
            else _train(active.plan, assignment, local, stamp)
        )
        return replace(active, work=WorkingNow()), (job,)
    if library.find(model, digest) is None:
        reason = library.shelf(model).bad.get(digest, "it was replaced before it was here")
        return abort(active, Fault("model-unusable", f"the version does not run: {reason}"), stamp)
    return active, ()


def _begin_on_pending(active: ActiveRound, assignment: Training, library: Library, stamp: Stamp) -> Step:
    pending = library.pending.get(assignment.task.model)
    if pending is None or pending.order != assignment.task.order:
        return abort(active, Fault("update-lost", "the update that the buffer collects is not here"), stamp)
    return replace(active, work=WorkingNow()), (ReadUpdate(active.round_id, pending.blob),)


def trained(active: ActiveRound, library: Library, update: LocalUpdate, stamp: Stamp) -> Step:
    """Training gave an update."""
    if not isinstance(active.work, WorkingNow) or not isinstance(active.assignment, Training):
        return active, ()
    finished = note(
        "trained",
        round=active.round_id,
        examples=update.example_count,
        loss_before=round(update.loss_before, 4),
        loss_after=round(update.loss_after, 4),
        staleness=active.assignment.staleness,
    )
    following, outputs = _with_update(active, active.assignment, contribution_of(update), library, stamp)
    return following, (finished, *outputs)


def update_read(active: ActiveRound, library: Library, contribution: Contribution, stamp: Stamp) -> Step:
    """The pending update that a buffer collects is here."""
    if not isinstance(active.work, WorkingNow) or not isinstance(active.assignment, Training):
        return active, ()
    assignment = active.assignment
    reading = note(
        "update-collected",
        round=active.round_id,
        version=assignment.manifest.version,
        staleness=assignment.staleness,
    )
    following, outputs = _with_update(active, assignment, contribution, library, stamp)
    return following, (reading, *outputs)


def _with_update(
    active: ActiveRound, assignment: Training, contribution: Contribution, library: Library, stamp: Stamp
) -> Step:
    """Weighs an update by its staleness, and goes on to mask it."""
    if assignment.staleness:
        weight = staleness_weight(assignment.staleness)
        contribution = weighted(contribution, active.plan.privacy.clip_norm, weight)
    return advance(replace(active, work=Worked(contribution)), library, stamp)


def evaluated(active: ActiveRound, library: Library, evaluation: Evaluation, stamp: Stamp) -> Step:
    """The version was run on this device's examples: no log shows its figures."""
    if not isinstance(active.work, WorkingNow) or not isinstance(active.assignment, Evaluating):
        return active, ()
    figures = {
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "examples": float(evaluation.example_count),
    }
    try:
        vector = evaluation_vector(active.assignment.task, figures)
    except NonFiniteFigure as error:
        return abort(active, Fault("evaluation-not-finite", str(error)), stamp)
    return advance(replace(active, work=Worked(Contribution(vector, {}))), library, stamp)


def field_read(active: ActiveRound, library: Library, value: float, stamp: Stamp) -> Step:
    """The field of a query has a value: no log ever shows it."""
    if not isinstance(active.work, WorkingNow) or not isinstance(active.assignment, Answering):
        return active, ()
    try:
        vector = answer_vector(active.assignment.task, value)
    except NonFiniteValue as error:
        return abort(active, Fault("value-not-finite", str(error)), stamp)
    return advance(replace(active, work=Worked(Contribution(vector, {}))), library, stamp)


def input_written(active: ActiveRound, blob: BlobRef, local: BlobRef | None, stamp: Stamp) -> Step:
    """The masked input is on disk: commit to it, enter it into the ledger, and offer it.

    Local parameters move with it, in the same transaction: once for each contribution. A round that this
    device leaves before has changed nothing; what becomes of the sum afterwards does not matter to them.
    """
    if not isinstance(active.client, Masking) or not isinstance(active.work, MaskingNow):
        return active, ()
    client, _ = secagg.handle(active.client, secagg.InputMasked(blob))
    active = replace(
        active,
        client=client,
        upload=blob,
        work=Unstarted(),
        offer_at=stamp.steady + OFFER_SECONDS,
        patience=OFFER_SECONDS,
    )
    plan = active.plan
    entry = LedgerEntry(
        round_id=plan.round_id,
        at=stamp.unix,
        fleet=plan.fleet,
        task=plan.task,
        plan_sha256=active.document.digest.hex(),
        signer=active.document.key_id,
        delta=plan.privacy.delta,
        event=contribution_event(plan, active.encoding),
    )
    moved: Outputs = ()
    if isinstance(active.assignment, Training):
        manifest = active.assignment.manifest
        if local is not None:
            moved = (SaveLocal(manifest.name, manifest.local_layout, local),)
        if active.assignment.task.order is not None:
            # In the transaction that commits to the masked input, so that no other buffer gets it, ever.
            moved = (*moved, DropPending(manifest.name))
    return active, (
        _save(active, stamp),
        SaveContribution(entry),
        *moved,
        note("input-masked", round=plan.round_id, bytes=blob.size),
        Send(UploadOffer(round_id=plan.round_id, blob=blob)),
    )


def chunks_needed(active: ActiveRound, need: BlobNeed, stamp: Stamp) -> Step:
    """The aggregator pulls chunks of the masked input."""
    if active.upload != need.blob:
        return active, ()
    # While it pulls it has the offer; offering again would only cost a message.
    later = replace(active, offer_at=stamp.steady + 2 * OFFER_SECONDS, patience=OFFER_SECONDS)
    return later, (SendChunks(active.round_id, need),)


def receipt_received(active: ActiveRound, receipt: UploadReceipt, stamp: Stamp) -> Step:
    """The masked input is durably stored at the aggregator, or will never be used."""
    if active.upload != receipt.blob or active.uploaded:
        return active, ()
    if not receipt.accepted:
        # Its masks may already count as those of a dropout, so that nothing is left to answer.
        return close(active, f"upload refused: {receipt.code}", stamp)
    active = replace(active, uploaded=True)
    return active, (_save(active, stamp), note("uploaded", round=active.round_id))


def tick(active: ActiveRound, stamp: Stamp, *, hurry: bool = False) -> Step:
    """Ends an expired round; offers an upload again that nobody acknowledged."""
    if stamp.unix >= active.plan.expires_at:
        return close(active, "the plan expired", stamp)
    if not isinstance(active.client, InputSent) or active.uploaded:
        return active, ()
    if not hurry and stamp.steady < active.offer_at:
        return active, ()
    patience = OFFER_SECONDS if hurry else min(1.5 * active.patience, MAX_OFFER_SECONDS)
    offer = UploadOffer(round_id=active.round_id, blob=active.client.masked_input)
    return replace(active, offer_at=stamp.steady + patience, patience=patience), (Send(offer),)


def abort(active: ActiveRound, fault: Fault, stamp: Stamp) -> Step:
    """Leaves the round because this device cannot go on, and says so."""
    if isinstance(active.client, InputSent | SetSigned | Unmasked) and active.uploaded:
        # What is uploaded is complete; only the answers are still owed, and they need no work.
        return active, ()
    client, _ = secagg.abort(active.client, RoundViolation(fault.code, fault.detail))
    return _leave(client, stamp)


def close(active: ActiveRound, outcome: str, stamp: Stamp) -> Step:
    """Forgets everything about the round but its id and how it went."""
    return None, (
        CloseRound(active.round_id, outcome, stamp.unix),
        note("round-closed", round=active.round_id, outcome=outcome),
    )


def _leave(client: Aborted, stamp: Stamp) -> Step:
    round_id, answer = client.context.round_id, client.answer
    return None, (
        CloseRound(round_id, f"aborted: {answer.code}", stamp.unix),
        warning("round-aborted", round=round_id, code=answer.code, detail=answer.detail),
        Send(answer),
    )


def _save(active: ActiveRound, stamp: Stamp) -> SaveRound:
    record = RoundRecord(active.document, active.assignment, active.client, active.upload, active.uploaded)
    return SaveRound(record, stamp.unix)


def _hidden(privacy: PrivacyParameters, assignment: Training, stamp: Stamp) -> HiddenExamples | None:
    if privacy.example is None:
        return None
    return HiddenExamples(
        example_mechanism(privacy, assignment.dimension),
        privacy.example.steps(assignment.task.training.local_epochs),
        derive_key(stamp.entropy, purpose="edge/hidden-examples"),
    )


def _train(plan: Plan, assignment: Training, local: BlobRef | None, stamp: Stamp) -> Train:
    config = training_config(plan.privacy, assignment, stamp)
    return Train(plan.round_id, assignment.manifest, config, local)


def training_config(privacy: PrivacyParameters, assignment: Training, stamp: Stamp) -> TrainingConfig:
    """How to train what a plan asks, with fresh randomness."""
    training = assignment.task.training
    return TrainingConfig(
        local_epochs=training.local_epochs,
        learning_rate=training.learning_rate,
        proximal_mu=training.proximal_mu,
        seed=int.from_bytes(derive_key(stamp.entropy, purpose="edge/example-order")[:8], "little"),
        hidden=_hidden(privacy, assignment, stamp),
    )
