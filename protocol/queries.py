"""What a device answers a query with: its one value, as a vector of norm at most 1.

    sum, mean             (v - middle) / half      one element in [-1, 1]; middle and half are of [low, high]
    histogram, quantile   the unit vector of v's bin

That norm is the clip norm of a query's plan: what one device can change follows from the public bounds alone.
No count rides along, because who took part is public in secure aggregation: the sum of n values is
n * middle + half * (sum of the elements).

No rotation: with it a single value has nothing to be spread over, and an element of a unit vector is a whole
number of quantization steps as it is, so that histograms are rounded without error.
"""

from __future__ import annotations

import math
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError
from protocol.plan import HistogramQuestion, MeanQuestion, QuantileQuestion, QueryTask, SumQuestion


class NonFiniteValue(ProtocolError, ValueError):
    """A value that is NaN or infinite: no bound clips it to anything that it could mean."""


def half_width(task: QueryTask) -> float:
    """Half of high - low: what an element of 1 stands for."""
    return task.high / 2 - task.low / 2


def middle(task: QueryTask) -> float:
    """The middle of [low, high]: what an element of 0 stands for."""
    return task.low / 2 + task.high / 2


def bin_edges(task: QueryTask, bins: int) -> NDArray[np.float64]:
    """Edges of the bins, float64, shape (bins + 1,); a bin holds its lower edge, the last one both."""
    return np.linspace(task.low, task.high, bins + 1)


def answer_vector(task: QueryTask, value: float) -> NDArray[np.float32]:
    """Turns this device's value into its contribution.

    Args:
        task: of the plan.
        value: in the field's unit; clipped to the task's bounds.

    Returns:
        float32, shape (task.dimension,), L2 norm at most 1.

    Raises:
        NonFiniteValue: NaN or infinity; nothing was made.
    """
    if not math.isfinite(value):
        raise NonFiniteValue(f"the value of {task.field} is NaN or infinite")
    clipped = min(max(value, task.low), task.high)
    question = task.question
    if isinstance(question, SumQuestion | MeanQuestion):
        return np.array([(clipped - middle(task)) / half_width(task)], np.float32)
    if isinstance(question, HistogramQuestion | QuantileQuestion):
        share = (clipped - task.low) / (task.high - task.low)
        vector = np.zeros(question.bins, np.float32)
        vector[min(int(share * question.bins), question.bins - 1)] = 1.0
        return vector
    assert_never(question)
