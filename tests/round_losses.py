"""What rounds must not lose, whatever dies in them: uploads, versions, ledger entries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.operations import OperationRefused, Operator
from aggregator.registry.artefacts import MissingArtefact
from aggregator.round_operations import RoundView
from models.weights import decode_weights
from protocol import ring, transcript
from protocol.dp.mechanism import decode
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.round_encoding import round_encoding
from tests.aggregator_devices import SimulatedDevice, toy_input


@dataclass(frozen=True)
class Losses:
    """What was acknowledged, promised or spent, and is not there.

    Attributes:
        uploads: acknowledged, of a round that completed, and not in its sum.
        versions: of rounds whose devices were told that they completed, or that are recorded as completed.
        ledger_entries: of rounds that asked for unmasking; one that is there twice counts as well.
    """

    uploads: int = 0
    versions: int = 0
    ledger_entries: int = 0


def exact_weights(operator: Operator, view: RoundView) -> NDArray[np.float32]:
    """The weights that a completed round of simulated devices must have made."""
    document = SignedDocument.model_validate_json(view.record.plan)
    plan = Plan.from_bytes(document.payload)
    base = operator.model(view.record.model, view.record.base_version)
    encoding = round_encoding(plan, document.digest, base.manifest.parameter_count)
    total = np.zeros(encoding.length, np.uint32)
    for device_id in view.report.survivors:
        ring.add(total, toy_input(device_id, encoding), encoding.bits, out=total)
    mean = decode(total, len(view.report.survivors), encoding)[0]
    return decode_weights(base.weights, base.manifest) + mean


def count_losses(operator: Operator, devices: Collection[SimulatedDevice]) -> Losses:
    """Compares what devices were told with what the aggregator has, round by round.

    Raises:
        BrokenTranscript: the transcripts do not chain.
    """
    uploads = versions = entries = 0
    views = operator.rounds()
    with operator.repository.read() as reader:
        spent = [entry.round_id for entry in reader.ledger()]
        transcripts = [reader.transcript(view.record.round_id) for view in views]
    head = transcript.GENESIS
    for view, records in zip(views, transcripts, strict=True):
        round_id, completed = view.record.round_id, view.record.status == "completed"
        told = any(d.ends[round_id].completed for d in devices if round_id in d.ends)
        asked = any(round_id in d.asked for d in devices)
        if completed or told:
            published = _published(operator, view)
            versions += published is None
            acknowledged = {d.device_id for d in devices if round_id in d.stored}
            if published is None or not np.array_equal(published, exact_weights(operator, view)):
                uploads += len(acknowledged)
            else:
                uploads += len(acknowledged - set(view.report.survivors))
        entries += abs(spent.count(round_id) - 1) if asked or completed else 0
        transcript.verify(records, head)
        head = transcript.digest(records[-1])
    # A completed round of another life of the database would show here.
    known = {view.record.round_id for view in views}
    versions += len({r for d in devices for r, end in d.ends.items() if end.completed} - known)
    entries += len({r for d in devices for r in d.asked} - known)
    uploads += len({(d.device_id, r) for d in devices for r in d.stored if r not in known})
    return Losses(uploads, versions, entries)


def _published(operator: Operator, view: RoundView) -> NDArray[np.float32] | None:
    """The weights of the version that a round made, read and checked; None when there is none."""
    made = [v for v in operator.versions(view.record.model) if v.round_id == view.record.round_id]
    if len(made) != 1 or made[0].version != view.record.version:
        return None
    try:
        model = operator.model(view.record.model, made[0].version)
    except (OperationRefused, MissingArtefact):
        return None
    return decode_weights(model.weights, model.manifest)
