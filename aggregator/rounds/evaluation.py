"""From the noisy mean vector of an evaluation's round to how well a version does on the devices."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.dp.mechanism import EncodingParameters
from protocol.evaluation import mean_figures, units
from protocol.fields import Schema
from protocol.plan import EvaluateTask

_Z = 1.959963984540054
"""Standard normal quantile of 0.975: the integer noise has standard deviations of hundreds and more."""


class Figure(Schema):
    """The mean of one figure over the devices that took part, each of which counts as 1.

    Attributes:
        mean: with the noise of the privacy mode, which can take it beyond what a figure can be.
        standard_error: of noise and rounding in it.
        low, high: hold the true mean over these devices with a probability of 95 %. How well these devices
            stand for the fleet is another question.
    """

    mean: float
    standard_error: float
    low: float
    high: float


class VersionEvaluation(Schema):
    """How a version did on the devices of one round.

    Attributes:
        metrics: of `loss`, `accuracy` and `examples` what was asked for.
        participants: devices whose figures are in the means.
        held_out: of them, how many have no part in any version of the model.
        epsilon: that it costs each of them, by itself, at the plan's delta; None without noise.
    """

    model: str
    version: int
    round_id: str
    at: float
    participants: int
    held_out: int = 0
    metrics: Mapping[str, Figure]
    epsilon: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The JSON that the repository keeps."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> VersionEvaluation:
        """Parses `to_bytes`."""
        return cls.model_validate_json(data)


def figures(
    task: EvaluateTask, mean: NDArray[np.float32], survivors: Sequence[int], encoding: EncodingParameters
) -> dict[str, Figure]:
    """Works out the means and what is uncertain about them.

    Args:
        task: of the plan.
        mean: noisy mean of the devices' vectors, float32, shape (task.dimension,).
        survivors: devices in each sub-cohort's sum; each sum has its own noise.
        encoding: of the round.
    """
    participants = sum(survivors)
    variance = participants * encoding.local_variance + len(survivors) * encoding.central_variance
    # A stochastic rounding of one value has a variance of at most 1/4 squared steps.
    one = math.sqrt(variance + participants / 4) / (encoding.scale * participants)
    found = {}
    for unit, (name, value) in zip(units(task), mean_figures(task, mean).items(), strict=True):
        error = float(unit) * one
        # An element passed through float32 on the device and on the aggregator.
        reach = _Z * error + float(unit) * 2.0**-23
        found[name] = Figure(mean=value, standard_error=error, low=value - reach, high=value + reach)
    return found
