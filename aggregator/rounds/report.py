"""What can be told about a round, while it runs and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from protocol.fields import Schema

Phase = Literal["AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"]


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


class Traffic(Schema):
    """Payload bytes between one device and the aggregator in a round, without MQTT's own headers.

    Telemetry: what passed since the last phase change is forgotten when the aggregator crashes.
    """

    up: int = 0
    down: int = 0


class RoundReport(Schema):
    """A round in figures; nothing in it is secret or about one device's data.

    Attributes:
        survivors: devices whose input is in the released sum.
        metrics: means over the survivors, by name, with the noise of the privacy mode.
        metric_noise: standard deviation of the noise in each metric; 0 where the mode adds none.
        misbehaved: devices whose shares did not fit the secret they belong to. Whoever dealt a wrong share
            can frame its holder, so nobody is excluded for this automatically.
        declined: device id -> why it refused the plan or left the round, in its own words.
        epsilon: spent by the model's population so far, at `delta`; None without noise.
    """

    phases: tuple[PhaseReport, ...] = ()
    survivors: tuple[str, ...] = ()
    metrics: Mapping[str, float] = Field(default_factory=dict)
    metric_noise: Mapping[str, float] = Field(default_factory=dict)
    traffic: Mapping[str, Traffic] = Field(default_factory=dict)
    misbehaved: tuple[str, ...] = ()
    declined: Mapping[str, str] = Field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None

    def to_bytes(self) -> bytes:
        """The JSON that the repository keeps."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundReport:
        """Parses `to_bytes`."""
        return cls.model_validate_json(data)
