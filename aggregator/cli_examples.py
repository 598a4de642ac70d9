"""How `covey privacy plan --mode example` answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.privacy.example_forecast import ExampleForecast


def example_json(result: ExampleForecast) -> dict[str, object]:
    """The forecast for machines, with the keys of the other modes; None is an epsilon that does not exist."""
    intention, mechanism = result.intention, result.mechanism
    return {
        "noise_multiplier": mechanism.example.noise_multiplier,
        "epsilon_per_round": _number(result.per_round.epsilon),
        "epsilon_total": _number(result.total.epsilon),
        "delta": intention.delta,
        "clip_norm": mechanism.example.clip_norm,
        "scale": mechanism.scale,
        "bits": None,
        "scaled_l2": mechanism.radius,
        "local_stddev": math.sqrt(mechanism.variance),
        "min_survivors": 1,
        "mode": "example",
        "noise": mechanism.noise.value,
        "unit": result.total.unit,
        "epsilon_device": None,
        "rounds": intention.rounds,
        "steps_per_round": result.steps,
        "sampling_probability": intention.sampling_probability,
        "parameters": intention.dimension,
        "epsilon_total_if_coins_were_seen": _number(result.unsampled.epsilon),
    }


def example_lines(result: ExampleForecast) -> list[str]:
    """The forecast for a person."""
    intention, mechanism = result.intention, result.mechanism
    delta = intention.delta
    sizes = (100, 1_000, 10_000)
    return [
        f"mode               example ({mechanism.noise}); unit of privacy: one example of a device",
        "                   the device itself is promised nothing: its update is in the sum without noise",
        f"noise multiplier   {mechanism.example.noise_multiplier:g}",
        f"epsilon            {result.per_round.epsilon:.4g} a round, {result.total.epsilon:.4g} after "
        f"{intention.rounds}, at delta {delta:g}, for one example of a device in every round",
        f"sampling           each example in each of {result.steps} steps a round with probability "
        f"{intention.sampling_probability:g}, by the device's coins; were they seen: "
        f"epsilon {result.unsampled.epsilon:.4g}",
        "noise              norm in a step's gradient, times the clip norm "
        f"{mechanism.example.clip_norm:g}: "
        + "; ".join(
            f"{result.noise_norm(size) / mechanism.example.clip_norm:.3g} with {size:,} examples"
            for size in sizes
        ),
        f"grid               sensitivity {mechanism.radius} steps, noise of standard deviation "
        f"{math.sqrt(mechanism.variance):.6g}",
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
