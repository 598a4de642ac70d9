"""What a simulation is asked to do. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aggregator.optimizers import Server
from protocol.dp.parameters import NoiseDistribution, PrivacyMode


class SimulationError(RuntimeError):
    """The simulation cannot be done as asked; the message says what to change."""


class Engine(StrEnum):
    """What trains the simulated devices."""

    LOCAL = "local"
    """The devices' own trainer, encoding and accounting, in this process. Masks cancel, and are left out."""
    TFF = "tff"
    """TensorFlow Federated, in an environment of its own: an opinion that shares no code with Covey's."""


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanFile(BaseModel):
    """The figures of a campaign as `covey privacy plan --json` prints them, or written by hand; all optional.

    Attributes:
        population: simulated devices.
        mode: who adds noise.
        server_learning_rate: of the server's optimizer; its own when None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    population: Annotated[int, Field(ge=2, le=100_000)] | None = None
    rounds: Annotated[int, Field(ge=1, le=10_000)] | None = None
    cohort: Annotated[int, Field(ge=2)] | None = None
    min_survivors: Annotated[int, Field(ge=2)] | None = None
    local_epochs: Annotated[int, Field(ge=1)] | None = None
    learning_rate: _Positive | None = None
    proximal_mu: Annotated[float, Field(ge=0)] | None = None
    server_optimizer: Server | None = None
    server_learning_rate: _Positive | None = None
    mode: PrivacyMode | None = None
    noise: NoiseDistribution | None = None
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    clip_norm: _Positive | None = None
    adaptive_quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    bits: int | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    def updated(self, **given: Any) -> PlanFile:
        """These figures, with those that are not None put in their place."""
        said = self.model_dump() | {name: value for name, value in given.items() if value is not None}
        return PlanFile.model_validate(said)


FORECAST_MARK = "epsilon_total"
"""A key that every output of `covey privacy plan --json` has: what else it says are consequences."""


def read_plan(path: Path) -> PlanFile:
    """Reads a plan.

    Raises:
        SimulationError: it is none; says where.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and FORECAST_MARK in content:
            content = {name: value for name, value in content.items() if name in PlanFile.model_fields}
        return PlanFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SimulationError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, OSError) as error:
        raise SimulationError(f"{path} is no JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """The options of `covey simulate`.

    Attributes:
        engine: what trains.
        plan: figures of the campaign.
        data: `watch`, `digits`, or a directory with one NPZ file for each device.
        held_out: people or devices that are tested on and train nothing.
        report: where the report goes.
    """

    engine: Engine
    plan: PlanFile
    data: str | None
    held_out: int
    report: Path
