"""The chain of a round's records: what it accepts, and every way of tampering with it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from protocol import transcript
from protocol.dp.events import event_for
from protocol.dp.mechanism import derive_encoding
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.plan import TrainingParameters, TrainTask
from protocol.transcript import (
    GENESIS,
    AbortRecord,
    AnswerRecord,
    BrokenTranscript,
    Content,
    PlanRecord,
    PrivacyRecord,
    ReleaseRecord,
    RosterRecord,
    SurvivorsRecord,
    VersionRecord,
)

ROUND = "a" * 32
EVENT = event_for(
    derive_encoding(
        PrivacyParameters(
            mode=PrivacyMode.DISTRIBUTED, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, bits=20
        ),
        dimension=100,
        minimum_survivors=3,
        maximum_clients=5,
        rotation_seed=bytes(32),
    ),
    survivors=4,
)
PLAN = PlanRecord(
    plan_sha256="1" * 64,
    task=TrainTask(
        model="watch",
        base_version=1,
        manifest_sha256="0" * 64,
        training=TrainingParameters(local_epochs=1, learning_rate=0.1),
    ),
)
ROSTER = RosterRecord(roster_hash=b"r" * 32, size=5)
SURVIVORS = SurvivorsRecord(survivors_hash=b"s" * 32, size=4)
COMPLETED: list[Content] = [
    PLAN,
    ROSTER,
    SURVIVORS,
    PrivacyRecord(event=EVENT),
    ReleaseRecord(release_sha256="2" * 64),
    VersionRecord(version=2, manifest_sha256="3" * 64),
]


def test_a_completed_round_verifies_and_says_what_it_spent() -> None:
    records = transcript.write(ROUND, COMPLETED, GENESIS)
    parsed = transcript.verify(records, GENESIS)
    assert [record.content for record in parsed] == COMPLETED
    assert all(record.round_id == ROUND for record in parsed)


def test_a_query_ends_with_an_answer_and_nothing_else() -> None:
    answered = [*COMPLETED[:-1], AnswerRecord(answer_sha256="4" * 64)]
    assert [
        r.content for r in transcript.verify(transcript.write(ROUND, answered, GENESIS), GENESIS)
    ] == answered
    for wrong in (
        [*COMPLETED, AnswerRecord(answer_sha256="4" * 64)],
        [*answered, AbortRecord(code="too-few")],
        [PLAN, AnswerRecord(answer_sha256="4" * 64)],
    ):
        with pytest.raises(BrokenTranscript):
            transcript.write(ROUND, wrong, GENESIS)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_round_may_abort_at_any_point(length: int) -> None:
    contents: list[Content] = [*COMPLETED[:length], AbortRecord(code="too-few-survivors")]
    assert len(transcript.verify(transcript.write(ROUND, contents, GENESIS), GENESIS)) == length + 1


def test_rounds_chain() -> None:
    first = transcript.write(ROUND, COMPLETED, GENESIS)
    head = transcript.digest(first[-1])
    second = transcript.write("b" * 32, [PLAN, AbortRecord(code="x")], head)
    transcript.verify(second, head)
    with pytest.raises(BrokenTranscript, match="does not follow"):
        transcript.verify(second, GENESIS)


def _edit(change: Callable[[dict[str, object]], object]) -> Callable[[list[bytes]], list[bytes]]:
    def apply(records: list[bytes]) -> list[bytes]:
        content = json.loads(records[2])
        change(content)
        records[2] = json.dumps(content, separators=(",", ":")).encode()
        return records

    return apply


TAMPERING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a count is changed": _edit(lambda c: c["content"].update(size=3)),  # type: ignore[attr-defined]
    "the round is changed": _edit(lambda c: c.update(round_id="b" * 32)),
    "an unknown field is added": _edit(lambda c: c.update(note="x")),
    "a record is left out": lambda records: [*records[:2], *records[3:]],
    "two records are swapped": lambda records: [records[0], records[2], records[1], *records[3:]],
    "a record is repeated": lambda records: [*records[:2], records[1], *records[2:]],
    "the end is cut off": lambda records: records[:-1],
    "the beginning is cut off": lambda records: records[1:],
    "white space is added": lambda records: [*records[:-1], records[-1] + b" "],
    "a record is garbage": lambda records: [*records[:-1], b"garbage"],
    "a record is huge": lambda records: [*records[:-1], records[-1] + b" " * 20_000],
    "there is nothing": lambda records: [],
}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampering_is_found(how: str) -> None:
    records = TAMPERING[how](list(transcript.write(ROUND, COMPLETED, GENESIS)))
    with pytest.raises(BrokenTranscript):
        transcript.verify(records, GENESIS)


@pytest.mark.parametrize(
    "contents",
    [
        [ROSTER, PLAN, AbortRecord(code="x")],
        [PLAN, ROSTER],
        [PLAN, PLAN, AbortRecord(code="x")],
        [PLAN, VersionRecord(version=2, manifest_sha256="3" * 64)],
        [*COMPLETED, AbortRecord(code="x")],
        [*COMPLETED[:3], *COMPLETED[4:]],
    ],
)
def test_contents_that_are_no_round_are_not_written(contents: list[Content]) -> None:
    with pytest.raises(BrokenTranscript):
        transcript.write(ROUND, contents, GENESIS)
