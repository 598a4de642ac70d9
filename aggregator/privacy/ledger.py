"""The privacy ledger, re-computed from the transcript and held against the one that is stored.

The transcript chains every round's records by their hashes, so that an event cannot be left out, put in or
made cheaper without breaking the chain; the stored ledger is what the budget gate reads. Both must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from aggregator.privacy.accountant import account
from aggregator.records import LedgerEntry
from aggregator.repository import Reader
from protocol import transcript
from protocol.dp.accounting import Spent
from protocol.dp.events import DPEvent
from protocol.plan import QueryTask

_EVENT: TypeAdapter[DPEvent] = TypeAdapter(DPEvent)


@dataclass(frozen=True)
class Release:
    """One release that a transcript tells of.

    Attributes:
        model: the model that was trained or evaluated; None for a query.
    """

    round_id: str
    model: str | None
    event: DPEvent


@dataclass(frozen=True)
class LedgerAudit:
    """What was spent, as the transcript has it.

    Attributes:
        population: over all models: they all say something about the same devices.
        models: of each model's rounds alone.
        queries: of all queries alone.
        rounds: how many rounds the transcript holds, released or not.
        differences: where the stored ledger says something else, a sentence each; empty when it agrees.
    """

    population: Spent
    models: Mapping[str, Spent]
    queries: Spent
    rounds: int
    differences: tuple[str, ...]


def audit_ledger(reader: Reader, delta: float) -> LedgerAudit:
    """Re-computes the ledger from every ended round's transcript.

    Guarantee: if there are no differences, the stored ledger holds exactly the events of the chain, and the
        chain ends in the newest record that the repository knows.
    Assumes: whoever could rewrite every record is found out by a head digest kept elsewhere.

    Raises:
        BrokenTranscript: the chain is broken, or rounds are missing from it.
    """
    lines = whole_transcript(reader)
    releases = _releases(_rounds(lines))
    return replace(audit_transcript(lines, delta), differences=_differences(releases, reader.ledger()))


def audit_transcript(lines: Sequence[bytes], delta: float) -> LedgerAudit:
    """Re-computes the ledger from a whole transcript and nothing else, as anybody can who was given it.

    Args:
        lines: the records of all rounds in the order of their chain, from the first.
        delta: at which epsilon is stated.

    Raises:
        BrokenTranscript: a record is malformed, changed, missing or out of order.
    """
    chained = _rounds(lines)
    releases = _releases(chained)
    models = sorted({release.model for release in releases if release.model is not None})
    return LedgerAudit(
        account([release.event for release in releases], delta),
        {name: account([r.event for r in releases if r.model == name], delta) for name in models},
        account([r.event for r in releases if r.model is None], delta),
        len(chained),
        (),
    )


def whole_transcript(reader: Reader) -> list[bytes]:
    """The records of every ended round in the order of their chain, verified against the newest one.

    Raises:
        BrokenTranscript: the chain is broken, or rounds are missing from it.
    """
    ended = [entry.round_id for entry in reader.rounds() if entry.status != "running"]
    records = {round_id: reader.transcript(round_id) for round_id in ended}
    return _chain(records, reader.transcript_head())


def head_of(lines: Sequence[bytes]) -> str:
    """The digest of a transcript's newest record in hexadecimal: who kept it can tell a rewritten one."""
    return (transcript.digest(lines[-1]) if lines else transcript.GENESIS).hex()


def _rounds(lines: Sequence[bytes]) -> list[tuple[transcript.Record, ...]]:
    """Verifies records that follow on one another, round by round."""
    rounds, digest = [], transcript.GENESIS
    for _, group in itertools.groupby(lines, key=transcript.round_of):
        records = list(group)
        rounds.append(transcript.verify(records, digest))
        digest = transcript.digest(records[-1])
    return rounds


def _chain(records: Mapping[str, Sequence[bytes]], head: bytes | None) -> list[bytes]:
    """Puts rounds into the order of their chain, which is that of their ends, and verifies it."""
    waiting = {}
    for round_id, lines in records.items():
        if not lines:
            raise transcript.BrokenTranscript(f"round {round_id} has ended and has no transcript")
        waiting[transcript.previous(lines[0])] = lines
    chained: list[bytes] = []
    digest = transcript.GENESIS
    while digest in waiting:
        lines = waiting.pop(digest)
        transcript.verify(lines, digest)
        chained += lines
        digest = transcript.digest(lines[-1])
    if waiting or len({transcript.round_of(line) for line in chained}) != len(records):
        raise transcript.BrokenTranscript("rounds are missing: not all follow on one another")
    if digest != (transcript.GENESIS if head is None else transcript.digest(head)):
        raise transcript.BrokenTranscript("the chain does not end in the newest record")
    return chained


def _releases(rounds: Sequence[Sequence[transcript.Record]]) -> list[Release]:
    return [release for records in rounds if (release := _release(records)) is not None]


def _release(records: Sequence[transcript.Record]) -> Release | None:
    model = None
    for record in records:
        if isinstance(record.content, transcript.PlanRecord):
            task = record.content.task
            model = None if isinstance(task, QueryTask) else task.model
        if isinstance(record.content, transcript.PrivacyRecord):
            return Release(record.round_id, model, record.content.event)
    return None


def _differences(releases: Sequence[Release], ledger: Sequence[LedgerEntry]) -> tuple[str, ...]:
    told = {release.round_id: release for release in releases}
    stored = {entry.round_id: entry for entry in ledger}
    found = [f"round {id_} is in the transcript and not in the ledger" for id_ in told if id_ not in stored]
    for round_id, entry in stored.items():
        if round_id not in told:
            found.append(f"round {round_id} is in the ledger and not in the transcript")
            continue
        release = told[round_id]
        if entry.model != release.model:
            found.append(
                f"round {round_id} is of {release.model or 'a query'}, "
                f"the ledger says {entry.model or 'a query'}"
            )
        if _parse(entry.event) != release.event:
            found.append(f"round {round_id} has another event in the ledger than in the transcript")
    return tuple(found)


def _parse(data: bytes) -> DPEvent | None:
    try:
        return _EVENT.validate_json(data)
    except ValueError:
        return None
