"""What a device says of a version: its figures as a vector of norm at most 1, and the way back.

A figure in [0, bound] becomes share * (2 * figure / bound - 1): with the middle at 0, half the bound is all
that a device can move it by. The shares say how the norm is divided among the figures; the noise of a
figure's mean is bound * noise_multiplier / (2 * share * devices), nearly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError
from protocol.plan import EvaluateTask


class NonFiniteFigure(ProtocolError, ValueError):
    """A figure that is NaN or infinite: no bound clips it to anything that it could mean."""


def evaluation_vector(task: EvaluateTask, figures: Mapping[str, float]) -> NDArray[np.float32]:
    """Turns this device's figures into its contribution.

    Args:
        task: of the plan.
        figures: by name, at least those of the slots; clipped to [0, bound].

    Returns:
        float32, shape (task.dimension,), L2 norm at most 1 but for rounding.

    Raises:
        NonFiniteFigure: NaN or infinity; nothing was made.
    """
    elements = []
    for slot in task.slots:
        figure = figures[slot.name]
        if not math.isfinite(figure):
            raise NonFiniteFigure(f"the {slot.name} is NaN or infinite")
        elements.append(slot.share * (2 * min(max(figure, 0.0), slot.bound) / slot.bound - 1))
    return np.array(elements, np.float32)


def units(task: EvaluateTask) -> NDArray[np.float64]:
    """What an element of 1 stands for, float64, shape (task.dimension,), each in its figure's own unit."""
    return np.array([slot.bound / (2 * slot.share) for slot in task.slots])


def mean_figures(task: EvaluateTask, mean: NDArray[np.float32]) -> dict[str, float]:
    """The means of the figures, by name, from the (noisy) mean of the devices' vectors."""
    moved = mean.astype(np.float64) * units(task) + np.array([slot.bound / 2 for slot in task.slots])
    return {slot.name: float(value) for slot, value in zip(task.slots, moved, strict=True)}
