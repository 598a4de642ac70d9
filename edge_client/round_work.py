"""What this device works on in a round: an update, an evaluation or a field, and the masked input made of it.

Work and masking live in memory only: after a restart they begin anew, which nobody can see, because the first
masked input that is durably stored is the only one that is ever offered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from edge_client.active_round import (
    OFFER_SECONDS,
    ActiveRound,
    MaskingNow,
    Step,
    Unstarted,
    Worked,
    WorkingNow,
    abort,
    save,
)
from edge_client.durable import DropPending, SaveContribution, SaveLocal
from edge_client.events import Fault, Stamp
from edge_client.ledger import LedgerEntry
from edge_client.library import Library
from edge_client.masked_input import Contribution, contribution_of, weighted
from edge_client.outputs import Evaluate, MaskInput, Outputs, ReadField, ReadUpdate, Send, Train, note
from edge_client.training import Evaluation, HiddenExamples, LocalUpdate, TrainingConfig
from models.assignment import Answering, Evaluating, Training
from protocol.dp.example import example_mechanism
from protocol.dp.parameters import PrivacyParameters
from protocol.evaluation import NonFiniteFigure, evaluation_vector
from protocol.fields import BlobRef
from protocol.messages import UploadOffer
from protocol.plan import Plan, staleness_weight
from protocol.queries import NonFiniteValue, answer_vector
from protocol.round_encoding import contribution_event
from protocol.secagg import client as secagg
from protocol.secagg.client_state import Masking, SharesSent
from protocol.secagg.prg import derive_key


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
        save(active, stamp),
        SaveContribution(entry),
        *moved,
        note("input-masked", round=plan.round_id, bytes=blob.size),
        Send(UploadOffer(round_id=plan.round_id, blob=blob)),
    )


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
