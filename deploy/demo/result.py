"""What a demo or a simulation measured: the contents of `result.json`, and all that the report shows."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Accuracy = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PrivacyMode = Literal["none", "central", "distributed"]
ReportedMode = Literal["none", "central", "distributed", "local"]
Dataset = Literal["watch", "digits"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PersonAccuracy(_Record):
    """Accuracy on the recordings of one person that no device trained on."""

    person: str
    fold: Count
    examples: Count
    local: Accuracy | None  # mean over the devices, each trained alone
    federated: Accuracy
    central: Accuracy | None


class ConfusionMatrix(_Record):
    """Held-out examples of the federated model: rows are the truth, columns the answer."""

    labels: tuple[str, ...] = Field(min_length=2)
    counts: tuple[tuple[Count, ...], ...]

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.labels)
        if len(self.counts) != size or any(len(row) != size for row in self.counts):
            raise ValueError(f"{size} labels need a {size} x {size} matrix")
        return self


class PhaseSpan(_Record):
    """When one phase of a round ran, in seconds since the demo began."""

    round: int = Field(ge=1)
    phase: str
    start: Seconds
    end: Seconds

    @model_validator(mode="after")
    def _forward(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"round {self.round}: {self.phase} ends before it starts")
        return self


class Dropout(_Record):
    """A device that left in the middle of a round, and when it was back in one."""

    round: int = Field(ge=1)
    device: str
    phase: str
    at: Seconds
    returned_round: int | None = Field(default=None, ge=1)


class ModelVersion(_Record):
    """A published model."""

    version: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    note: str = ""


class Simulation(_Record):
    """What stood in for a fleet. Where a result has one, no device took part, and bytes are estimates."""

    engine: Literal["local", "tff"]
    cohort: int = Field(ge=2)
    # Mean over the held-out people, the model before the first round first.
    loss_per_round: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    server_optimizer: str
    refused_updates: Count


class DemoResult(_Record):
    """The figures of one demo, or of one simulation, which knows fewer.

    With several folds, accuracies are means over them, the traffic is a mean over all rounds and devices,
    and timeline and dropouts are those of the first fold.
    """

    dataset: str = Field(min_length=1, max_length=100)
    simulation: Simulation | None = None
    devices: int = Field(ge=2)
    folds: int = Field(ge=1)
    rounds: int = Field(ge=1)
    seed: int
    broker: str
    runtime: str

    # None where nothing was trained to compare with.
    local_accuracy: Accuracy | None
    federated_accuracy: Accuracy
    central_accuracy: Accuracy | None
    # The model before the first round comes first, so this is one longer than `rounds`.
    accuracy_per_round: tuple[Accuracy, ...]
    people: tuple[PersonAccuracy, ...] = Field(min_length=1)
    # What the held-out people's own devices answered, by `covey-edge predict` with the last version.
    device_predictions_right: Accuracy | None
    confusion: ConfusionMatrix

    privacy: ReportedMode
    # None where nothing is promised: JSON has no infinity.
    epsilon: float | None
    delta: float = Field(ge=0, lt=1)
    privacy_unit: str
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    clip_norm: float = Field(gt=0, allow_inf_nan=False)

    dropouts_survived: Count
    dropouts: tuple[Dropout, ...] = ()
    timeline: tuple[PhaseSpan, ...] = ()
    seconds_per_phase: dict[str, Seconds]

    upload_bytes_per_round: Count
    download_bytes_per_round: Count
    device_peak_rss_bytes: Count | None
    wall_seconds: Seconds
    round_seconds: Seconds

    model_versions: tuple[ModelVersion, ...]

    @model_validator(mode="before")
    @classmethod
    def _no_infinity(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("epsilon"), float):
            return data if math.isfinite(data["epsilon"]) else data | {"epsilon": None}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.accuracy_per_round) != self.rounds + 1:
            raise ValueError(f"{self.rounds} rounds need {self.rounds + 1} accuracies")
        if self.simulation is not None and len(self.simulation.loss_per_round) != self.rounds + 1:
            raise ValueError(f"{self.rounds} rounds need {self.rounds + 1} losses")
        if self.privacy == "none" and self.epsilon is not None:
            raise ValueError("without noise there is no epsilon")
        if self.epsilon is not None and self.epsilon < 0:
            raise ValueError("epsilon is negative")
        return self
