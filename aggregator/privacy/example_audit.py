"""The canary audit of mode example: the canaries are examples of one device, trained by DP-SGD.

A fair coin says of each canary whether its gradient is in the training or replaced by zeros, which is the
neighbouring relation. Whoever sees every step's noisy gradient, and knows all other examples, guesses the
coins. The steps are the device's own code (`protocol.dp.example.run_steps`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from aggregator.privacy.audit import (
    DIMENSION,
    AuditResult,
    AuditSettings,
    accuracy_of,
    bound_of,
    check_settings,
    directions_of,
    examples_of,
    gradient_step,
)
from aggregator.privacy.example_forecast import ExampleIntention, forecast_examples
from protocol.dp.errors import InvalidParameters
from protocol.dp.example import ExampleMechanism, run_steps
from protocol.dp.parameters import NoiseDistribution, PrivacyMode

SAMPLING = 0.5
STEPS_A_ROUND = 4
LEARNING_RATE = 0.5
_NEXT_TO_NOTHING = 1e-9
"""Variance of noise that is switched off: a sample is not 0 with about this probability."""


def audit_examples(
    settings: AuditSettings, noise: NoiseDistribution = NoiseDistribution.SKELLAM
) -> AuditResult:
    """Audits mode example; a round of the settings is four steps with half of the examples each.

    Raises:
        InvalidParameters: no such audit.
    """
    check_settings(settings)
    if settings.rounds < 1:
        raise InvalidParameters(f"need at least one round, got {settings.rounds}")
    forecast = forecast_examples(
        ExampleIntention(
            rounds=settings.rounds,
            local_epochs=round(STEPS_A_ROUND * SAMPLING),
            sampling_probability=SAMPLING,
            delta=settings.delta,
            epsilon=settings.epsilon,
            dimension=DIMENSION,
            noise=noise,
        )
    )
    steps = forecast.steps * settings.rounds
    found, right, accuracy = _run(forecast.mechanism, steps, settings, threshold=SAMPLING * steps / 2)
    # Without noise a canary that was in a single step shows itself.
    silent = replace(forecast.mechanism, variance=_NEXT_TO_NOTHING)
    without, _, _ = _run(silent, steps, settings, threshold=0.5)
    return AuditResult(
        PrivacyMode.EXAMPLE, noise, forecast.total.epsilon, found, without, right, settings.canaries, accuracy
    )


def _run(
    mechanism: ExampleMechanism, steps: int, settings: AuditSettings, threshold: float
) -> tuple[float, int, float]:
    rng = np.random.default_rng(settings.seed)
    canaries, directions = settings.canaries, directions_of(settings, rng)
    present = rng.random(canaries) < 0.5
    x, labels = examples_of(rng)
    count = canaries + len(labels)
    weights = np.zeros(DIMENSION, np.float32)
    scores, known = np.zeros(canaries), np.zeros(DIMENSION)

    def gradient(index: int) -> NDArray[np.float32]:
        if index < canaries:
            own: NDArray[np.float32] = directions[index] * np.float32(present[index])
            return own
        one = slice(index - canaries, index - canaries + 1)
        found: NDArray[np.float32] = -gradient_step(weights, x[one], labels[one])
        known.__iadd__(found / max(1.0, float(np.linalg.norm(found)) / mechanism.example.clip_norm))
        return found

    def apply(estimate: NDArray[np.float32]) -> None:
        scores.__iadd__(directions @ (estimate * (SAMPLING * count) - known))
        known.fill(0)
        weights.__isub__(np.float32(LEARNING_RATE) * estimate)

    run_steps(mechanism, steps, count, settings.seed.to_bytes(32, "big"), gradient, apply)
    bound, right = bound_of(scores - threshold, present, settings)
    return bound, right, accuracy_of(weights, x, labels)
