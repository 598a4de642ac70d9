"""The transcript of a round: what was done, in records that are chained by their hashes.

Every record names the digest of the one before it, across rounds, so that whoever keeps the newest digest can
tell whether anything before it was changed, left out or put in. A round has its records in this order:

    PlanRecord  RosterRecord*  SurvivorsRecord*  PrivacyRecord?  ReleaseRecord?
    VersionRecord | AnswerRecord | AbortRecord

with one roster and one survivor set for each sub-cohort that came so far.

Records hold digests and counts, no names of devices and nothing that was masked: enough to check a round's
artefacts, and to re-compute the privacy ledger from the DP events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from protocol.dp.events import DPEvent
from protocol.errors import ProtocolError
from protocol.fields import MAX_COHORT, PROTOCOL_VERSION, Bytes32, RoundId, Schema, Sha256
from protocol.plan import Task

MAX_RECORD_BYTES = 16_384
GENESIS = bytes(32)
"""What the first record of all names as the one before it."""

Count = Annotated[int, Field(ge=0, le=MAX_COHORT)]


class BrokenTranscript(ProtocolError):
    """Records that are changed, out of order, or not one round's."""


class PlanRecord(Schema):
    """The round began with this signed plan."""

    kind: Literal["plan"] = "plan"
    plan_sha256: Sha256
    task: Task
    """What the plan asks, which is public to every device of the cohort."""


class RosterRecord(Schema):
    """The roster was closed."""

    kind: Literal["roster"] = "roster"
    roster_hash: Bytes32
    size: Count


class SurvivorsRecord(Schema):
    """The survivor set was closed; its members signed it."""

    kind: Literal["survivors"] = "survivors"
    survivors_hash: Bytes32
    size: Count


class PrivacyRecord(Schema):
    """A sum was unmasked, or its unmasking was asked for: this much privacy is spent.

    With several sub-cohorts, what the one with the fewest survivors spent: a device is in one of them.
    """

    kind: Literal["privacy"] = "privacy"
    event: DPEvent


class ReleaseRecord(Schema):
    """What was released, noise included: SHA-256 of the mean update as little-endian float32, and of the
    mean metrics as JSON with sorted keys."""

    kind: Literal["release"] = "release"
    release_sha256: Sha256


class VersionRecord(Schema):
    """The round completed with this version."""

    kind: Literal["version"] = "version"
    version: Annotated[int, Field(ge=1, le=2**31)]
    manifest_sha256: Sha256


class AnswerRecord(Schema):
    """The round completed with this answer to a query, or evaluation of a version: SHA-256 of its JSON."""

    kind: Literal["answer"] = "answer"
    answer_sha256: Sha256


class AbortRecord(Schema):
    """The round aborted."""

    kind: Literal["abort"] = "abort"
    code: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]


Content = Annotated[
    PlanRecord
    | RosterRecord
    | SurvivorsRecord
    | PrivacyRecord
    | ReleaseRecord
    | VersionRecord
    | AnswerRecord
    | AbortRecord,
    Field(discriminator="kind"),
]

_ORDER = ("plan", "roster", "survivors", "privacy", "release", "version", "answer", "abort")
_ENDS = ("version", "answer", "abort")
_REPEATED = frozenset({"roster", "survivors"})


class Record(Schema):
    """One link of the chain."""

    v: Literal[1] = PROTOCOL_VERSION
    round_id: RoundId
    previous: Bytes32
    content: Content


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


def digest(record: bytes) -> bytes:
    """Names a record, and everything before it."""
    return hashlib.sha256(b"covey/v1/transcript" + record).digest()


def write(round_id: str, contents: Iterable[Content], head: bytes) -> tuple[bytes, ...]:
    """Chains the records of one round.

    Args:
        round_id: the round.
        contents: in the order of the module's docstring.
        head: digest of the newest record of the rounds before, or GENESIS.

    Returns:
        The records as bytes, which are what is hashed.

    Raises:
        BrokenTranscript: the contents are no round.
    """
    records = []
    newest = head
    for content in contents:
        data = Record(round_id=round_id, previous=newest, content=content).model_dump_json().encode()
        records.append(data)
        newest = digest(data)
    verify(records, head)
    return tuple(records)


def verify(records: Sequence[bytes], head: bytes) -> tuple[Record, ...]:
    """Checks the records of one round, and that they follow on `head`.

    Returns:
        The records, parsed. The digest of the last one is the head that the next round follows on.

    Raises:
        BrokenTranscript: a record is malformed, changed, missing, out of order or of another round.
    """
    parsed: list[Record] = []
    expected = head
    for number, data in enumerate(records):
        record = _parse(data)
        if record.previous != expected:
            raise BrokenTranscript(f"record {number} does not follow on the one before it")
        if record.round_id != (parsed[0].round_id if parsed else record.round_id):
            raise BrokenTranscript(f"record {number} is of another round")
        parsed.append(record)
        expected = digest(data)
    _check_order([record.content.kind for record in parsed])
    return tuple(parsed)


def previous(record: bytes) -> bytes:
    """Returns what a record names as the one before it, which is not verified yet.

    Raises:
        BrokenTranscript: it is no record.
    """
    return _parse(record).previous


def round_of(record: bytes) -> str:
    """Returns the round that a record says it is of, which is not verified yet.

    Raises:
        BrokenTranscript: it is no record.
    """
    return _parse(record).round_id


def _parse(data: bytes) -> Record:
    if len(data) > MAX_RECORD_BYTES:
        raise BrokenTranscript(f"a record of {len(data)} bytes is over {MAX_RECORD_BYTES}")
    try:
        record = _RECORD.validate_json(data)
    except ValidationError as error:
        raise BrokenTranscript("not a transcript record") from error
    if record.model_dump_json().encode() != data:
        raise BrokenTranscript("a record is not in its canonical form")
    return record


def _check_order(kinds: list[str]) -> None:
    places = [_ORDER.index(kind) for kind in kinds]
    once = [place for place, kind in zip(places, kinds, strict=True) if kind not in _REPEATED]
    if places != sorted(places) or len(once) != len(set(once)):
        raise BrokenTranscript(f"records are out of order or repeated: {kinds}")
    if not kinds or kinds[0] != "plan" or kinds[-1] not in _ENDS:
        raise BrokenTranscript("a round begins with a plan and ends with a version, an answer or an abort")
    completed, ends = _ORDER[: -len(_ENDS)], [kind for kind in kinds if kind in _ENDS]
    if ends != ["abort"] and (len(ends) > 1 or {*kinds} != {*completed, *ends}):
        raise BrokenTranscript(f"a completed round has every record, this one has {kinds}")
