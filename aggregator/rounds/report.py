"""What can be told about a round, while it runs and afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Self, get_args

from pydantic import Field

from aggregator.rounds.answer import Answer
from aggregator.rounds.evaluation import VersionEvaluation
from protocol.fields import Schema

Phase = Literal["AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In their order."""


class PhaseReport(Schema):
    """One phase of a round.

    Attributes:
        started: seconds since 1970.
        ended: None while it runs.
        expected: devices that owed an answer when it began.
        answered: devices that gave it.
        dropped: devices that did not; known once it has ended.
    """

    phase: Phase
    started: float
    ended: float | None = None
    expected: int
    answered: int = 0
    dropped: tuple[str, ...] = ()

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """One phase of several sub-cohorts as one."""
        ends = [part.ended for part in parts if part.ended is not None]
        return cls(
            phase=parts[0].phase,
            started=min(part.started for part in parts),
            ended=max(ends) if len(ends) == len(parts) else None,
            expected=sum(part.expected for part in parts),
            answered=sum(part.answered for part in parts),
            dropped=tuple(sorted(device_id for part in parts for device_id in part.dropped)),
        )


class SubcohortReport(Schema):
    """One sub-cohort of a round.

    Attributes:
        invited: devices of it that were selected.
        cohort: those that checked in; 0 until the roster is closed.
        survivors: of them, those whose input is in its sum.
        code: why it failed; empty unless it did.
    """

    invited: int
    cohort: int = 0
    survivors: int = 0
    code: str = ""


class Traffic(Schema):
    """Payload bytes between one device and the aggregator in a round, without MQTT's own headers.

    Telemetry: what passed since the last phase change is forgotten when the aggregator crashes.
    """

    up: int = 0
    down: int = 0


class BufferReport(Schema):
    """The updates that a round of a buffered campaign collects, by age.

    Attributes:
        staleness: device id -> how many versions its update is behind the one that the round starts from.
        too_old: devices whose updates were dropped since the round before, for being further behind than the
            campaign allows; they train anew. What happened before a restart of the service is not in it.
    """

    staleness: Mapping[str, int] = Field(default_factory=dict)
    too_old: tuple[str, ...] = ()


class RoundReport(Schema):
    """A round in figures; nothing in it is secret or about one device's data.

    Attributes:
        subcohorts: in the order of the plan's split; most rounds have one.
        survivors: devices whose input is in the released sum.
        metrics: means over the survivors, by name, with the noise of the privacy mode.
        metric_noise: standard deviation of the noise in each metric; 0 where the mode adds none.
        misbehaved: devices whose shares did not fit the secret they belong to. Whoever dealt a wrong share
            can frame its holder, so nobody is excluded for this alone.
        excluded: devices that broke the rules for sure, and are not selected until an operator includes them.
        declined: device id -> why it refused the plan or left the round, in its own words.
        answer: of a query that has completed.
        evaluation: of a version, that has completed.
        epsilon: spent by the model's population so far, at `delta`; None without noise.
        buffer: what it collects; None but for a buffered campaign.
    """

    phases: tuple[PhaseReport, ...] = ()
    subcohorts: tuple[SubcohortReport, ...] = ()
    survivors: tuple[str, ...] = ()
    metrics: Mapping[str, float] = Field(default_factory=dict)
    metric_noise: Mapping[str, float] = Field(default_factory=dict)
    traffic: Mapping[str, Traffic] = Field(default_factory=dict)
    misbehaved: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    declined: Mapping[str, str] = Field(default_factory=dict)
    answer: Answer | None = None
    evaluation: VersionEvaluation | None = None
    epsilon: float | None = None
    delta: float | None = None
    buffer: BufferReport | None = None

    def ages(self) -> dict[int, int]:
        """Versions behind -> how many updates in the sum are; empty but for a buffered campaign."""
        if self.buffer is None:
            return {}
        behind = self.buffer.staleness
        return dict(sorted(Counter(behind[each] for each in self.survivors if each in behind).items()))

    def to_bytes(self) -> bytes:
        """The JSON that the repository keeps."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundReport:
        """Parses `to_bytes`."""
        return cls.model_validate_json(data)
