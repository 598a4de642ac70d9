"""From the noisy mean vector of a query's round to its answer, with what the noise leaves uncertain.

The errors are those of the mechanism alone: noise, and the rounding to the ring. An answer is about the
devices that took part; how well those stand for the fleet is another question.

Quantiles come from one histogram, not from a bisection over several rounds: one round answers for every q,
and log2(bins) rounds would each cost a round trip to the fleet and a share of the budget. The number of
values below an edge is a sum of noisy bins; that of all bins together is known exactly (who took part is
public), so that the error is pinned to 0 at both ends and grows to sqrt(bins) / 2 times that of one bin in
the middle. More bins are finer and noisier.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from protocol.dp.mechanism import EncodingParameters
from protocol.fields import Schema
from protocol.plan import HistogramQuestion, MeanQuestion, QuantileQuestion, QueryTask, SumQuestion
from protocol.queries import bin_edges, half_width, middle

CONFIDENCE = 0.95
_Z = 1.959963984540054
"""Standard normal quantile of (1 + CONFIDENCE) / 2. The noise is a sum of integers whose standard deviation
is of hundreds and more, or of many devices' shares, and so as good as normal."""
_FLOAT32 = 2.0**-23
"""Relative error of a value that passed through float32 once on the device and once on the aggregator."""


class NumberAnswer(Schema):
    """A sum or a mean.

    Attributes:
        standard_error: of noise and rounding in the estimate, in the field's unit.
        low, high: hold the cohort's true figure with a probability of at least 95 %.
    """

    kind: Literal["number"] = "number"
    estimate: float
    standard_error: float
    low: float
    high: float


class HistogramAnswer(Schema):
    """A histogram.

    Attributes:
        edges: of the bins, one more than there are counts.
        counts: noisy, so that they are no whole numbers and may be negative; they add up to the participants.
        standard_error: of each count.
    """

    kind: Literal["histogram"] = "histogram"
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    standard_error: float


class QuantileAnswer(Schema):
    """A quantile.

    Attributes:
        estimate: by a straight line within its bin.
        low, high: edges of bins that hold the true quantile between them with a probability of at least 95 %.
        resolution: width of a bin, below which nothing is told apart.
    """

    kind: Literal["quantile"] = "quantile"
    estimate: float
    low: float
    high: float
    resolution: float


Figures = Annotated[NumberAnswer | HistogramAnswer | QuantileAnswer, Field(discriminator="kind")]


class Answer(Schema):
    """What a query's round gave.

    Attributes:
        task: what was asked.
        participants: devices whose values are in it.
        epsilon: that this answer costs each of them, by itself, at the plan's delta; None without noise.
    """

    task: QueryTask
    participants: int
    epsilon: float | None = None
    figures: Figures

    @property
    def digest(self) -> str:
        """SHA-256 of the answer's JSON, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class _Errors:
    """Standard deviations in one coordinate of the sum, in units of that coordinate."""

    noise: float
    rounding: float


def answer(
    task: QueryTask, mean: NDArray[np.float32], survivors: Sequence[int], encoding: EncodingParameters
) -> Answer:
    """Works out the answer.

    Args:
        task: of the plan.
        mean: noisy mean of the devices' vectors, float32, shape (task.dimension,).
        survivors: devices in each sub-cohort's sum; each sum has its own noise.
        encoding: of the round.
    """
    participants = sum(survivors)
    variance = participants * encoding.local_variance + len(survivors) * encoding.central_variance
    errors = _Errors(
        noise=math.sqrt(variance) / encoding.scale,
        # A stochastic rounding of one value has a variance of at most 1/4 squared steps.
        rounding=math.sqrt(participants) / 2 / encoding.scale,
    )
    question = task.question
    figures: Figures
    if isinstance(question, SumQuestion | MeanQuestion):
        figures = _number(task, float(mean[0]), participants, errors)
    elif isinstance(question, HistogramQuestion):
        counts = _counts(mean, participants)
        # A unit vector is a whole number of steps: histograms are rounded without error.
        error = errors.noise * math.sqrt(1 - 1 / question.bins)
        edges = bin_edges(task, question.bins)
        figures = HistogramAnswer(
            edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), standard_error=error
        )
    elif isinstance(question, QuantileQuestion):
        figures = _quantile(task, question, _counts(mean, participants), participants, errors.noise)
    else:
        assert_never(question)
    return Answer(task=task, participants=participants, figures=figures)


def _number(task: QueryTask, element: float, participants: int, errors: _Errors) -> NumberAnswer:
    half, many = half_width(task), participants if isinstance(task.question, SumQuestion) else 1
    estimate = many * (middle(task) + half * element)
    error = many * half * math.hypot(errors.noise, errors.rounding) / participants
    reach = _Z * error + many * half * _FLOAT32
    return NumberAnswer(estimate=estimate, standard_error=error, low=estimate - reach, high=estimate + reach)


def _counts(mean: NDArray[np.float32], participants: int) -> NDArray[np.float64]:
    """Counts of the bins, moved alike so that they add up to the participants, which are known."""
    counts = mean.astype(np.float64) * participants
    counts += (participants - float(counts.sum())) / counts.size
    return counts


def _quantile(
    task: QueryTask, question: QuantileQuestion, counts: NDArray[np.float64], participants: int, noise: float
) -> QuantileAnswer:
    bins, edges = question.bins, bin_edges(task, question.bins)
    below = np.concatenate(([0.0], np.cumsum(counts)))
    below[-1] = participants
    inner = np.arange(bins + 1)
    # k noisy bins, less k times the mean noise of all bins: k (bins - k) / bins times the variance of one.
    reach = _Z * noise * np.sqrt(inner * (bins - inner) / bins) + participants * bins * _FLOAT32
    wanted = question.q * participants
    plausible = np.flatnonzero((below[:-1] - reach[:-1] <= wanted) & (below[1:] + reach[1:] >= wanted))
    # The mean of the smallest rising curve above and the largest one below: rising, and nowhere farther from
    # the truth than the worst error of `below`.
    above = np.maximum.accumulate(below)
    under = np.minimum.accumulate(below[::-1])[::-1]
    rising = np.clip((above + under) / 2, 0, participants)
    index = int(np.clip(np.searchsorted(rising, wanted, side="right") - 1, 0, bins - 1))
    step = rising[index + 1] - rising[index]
    share = (wanted - rising[index]) / step if step > 0 else 0.5
    return QuantileAnswer(
        estimate=float(edges[index] + min(max(share, 0.0), 1.0) * (edges[index + 1] - edges[index])),
        low=float(edges[min([index, *plausible.tolist()])]),
        high=float(edges[max([index, *plausible.tolist()]) + 1]),
        resolution=(task.high - task.low) / bins,
    )
