"""Gives up rounds that cannot be restored: what they may have spent in privacy is entered, at its most.

A round that was running when the service ended is restored from its records. When these cannot be read (a
damaged disk, a version that is gone, an older Covey after a newer one) the round ends here. Whether devices
were asked to unmask follows from the kinds of its log entries alone; with how many survivors does not, so the
fewest that the plan allows are counted, which costs the most.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress

from pydantic import ValidationError

from aggregator.records import LedgerEntry, Round, RoundEnding
from aggregator.registry.publishing import manifest_of
from aggregator.repository import Reader
from aggregator.rounds.report import PHASES, RoundReport
from aggregator.spending import epsilon_of, spent_events
from aggregator.work import Work
from protocol import transcript
from protocol.dp.events import DPEvent, Mechanism, event_for
from protocol.dp.parameters import PrivacyMode
from protocol.errors import ProtocolError
from protocol.identity import SignedDocument
from protocol.messages import RoundEnd
from protocol.plan import Plan, Task, TrainTask
from protocol.round_encoding import round_encoding

logger = logging.getLogger(__name__)

CODE = "not-restorable"


def give_up(work: Work, record: Round, reason: str) -> None:
    """Ends a round that cannot be restored, in one transaction.

    Guarantee: if devices were asked to unmask, the ledger gets an event that costs no less than what
        happened; one that promises nothing, when not even the plan can be read.
    """
    writer = work.writer
    event = _largest_event(writer, record) if _was_released(writer, record.round_id) else None
    plan = _read_plan(record)
    contents: list[transcript.Content] = []
    if plan is not None:
        contents.append(transcript.PlanRecord(plan_sha256=plan[0].digest.hex(), task=plan[1].task))
        if event is not None:
            contents.append(transcript.PrivacyRecord(event=event))
        contents.append(transcript.AbortRecord(code=CODE))
    head = writer.transcript_head()
    records: tuple[bytes, ...] = ()
    if contents:
        previous = transcript.GENESIS if head is None else transcript.digest(head)
        records = transcript.write(record.round_id, contents, previous)
    ledger = None
    if event is not None:
        ledger = LedgerEntry(record.round_id, record.model, work.at.unix, event.model_dump_json().encode())
    writer.end_round(
        RoundEnding(
            round_id=record.round_id,
            status="aborted",
            ended_at=work.at.unix,
            code=CODE,
            detail=reason[:300],
            report=_report(writer, record, event, None if plan is None else plan[1].privacy.delta),
            version=None,
            ledger=ledger,
            transcript=records,
        )
    )
    for device_id in record.invited:
        work.send(device_id, RoundEnd(round_id=record.round_id, completed=False, reason=CODE))
    logger.error(
        "round %s cannot be restored and is given up (%s): %s",
        record.round_id[:8],
        "its privacy is counted" if event is not None else "nothing was unmasked",
        reason,
    )


def _was_released(reader: Reader, round_id: str) -> bool:
    """Whether all phases before the unmasking were closed, in one sub-cohort at least."""
    closed = Counter(entry.frame for entry in reader.log(round_id) if entry.kind == "closed")
    return any(count >= PHASES.index("Unmasking") for count in closed.values())


def _read_plan(record: Round) -> tuple[SignedDocument, Plan] | None:
    try:
        document = SignedDocument.model_validate_json(record.plan)
        return document, Plan.from_bytes(document.payload)
    except (ProtocolError, ValidationError):
        return None


def _largest_event(reader: Reader, record: Round) -> DPEvent:
    read = _read_plan(record)
    if read is not None:
        document, plan = read
        with suppress(ValueError):  # of a manifest or figures that nobody can read: they promise nothing
            dimension = _dimension(reader, plan.task)
            if dimension is not None:
                encoding = round_encoding(plan, document.digest, dimension)
                return event_for(encoding, encoding.minimum_survivors)
    return DPEvent(
        mechanism=Mechanism.NONE,
        mode=PrivacyMode.NONE,
        noise_multiplier=0.0,
        clip_norm=1.0,
        sensitivity_squared=0,
        variance_per_share=0.0,
        dimension=1,
        survivors=1,
        minimum_survivors=1,
    )


def _dimension(reader: Reader, task: Task) -> int | None:
    """Elements of a device's vector; None when the model is gone."""
    if not isinstance(task, TrainTask):
        return task.dimension
    # Versions of one model have the same parameters, so any of them tells the length of the sum.
    version = reader.version(task.model, task.base_version) or reader.newest_version(task.model)
    return None if version is None else manifest_of(version).parameter_count


def _report(reader: Reader, record: Round, event: DPEvent | None, delta: float | None) -> bytes:
    try:
        report = RoundReport.from_bytes(record.report)
    except ValidationError:
        report = RoundReport()
    if delta is None:
        return report.to_bytes()
    events = [*spent_events(reader), *(() if event is None else (event,))]
    return report.model_copy(update={"epsilon": epsilon_of(events, delta), "delta": delta}).to_bytes()
