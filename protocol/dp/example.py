"""DP-SGD with integer noise: what hides one example of a device in its training. Pure.

    in each step, every example by a coin of its own: gradient -> clip -> to integers
    their sum + integer noise -> back to the gradient's unit, over the expected number of examples

This is Abadi et al. 2016 (arXiv 1607.00133, Algorithm 1) on a grid: floating-point noise would decide a
secret (Mironov 2012). Coins and noise come from the device's ChaCha20 keys; all that follows a step's noisy
sum, and so the update that leaves the device, is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.dp.clipping import clip_factor
from protocol.dp.errors import InvalidParameters
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution, PrivacyMode, PrivacyParameters
from protocol.dp.sampling import (
    IntegerSampler,
    discrete_gaussian_distance,
    discrete_gaussian_sampler,
    skellam_distance,
    skellam_sampler,
)
from protocol.dp.scaling import MAX_LOCAL_STDDEV, MAX_RADIUS
from protocol.secagg.prg import Keystream, derive_key

_WORDS = 2.0**32
_SHRINK = 1 - 2.0**-30


@dataclass(frozen=True)
class ExampleMechanism:
    """One step's mechanism.

    Attributes:
        example: clip norm, noise and sampling, of the plan.
        noise: the integer noise.
        dimension: d, elements of a gradient.
        radius: L2 bound of one example's integers: the sensitivity, exactly.
        variance: of the noise per coordinate, in squared steps of the grid.
    """

    example: ExamplePrivacy
    noise: NoiseDistribution
    dimension: int
    radius: int
    variance: float

    @property
    def scale(self) -> float:
        """Steps of the grid per unit of the gradient."""
        return self.radius / self.example.clip_norm

    def sampler(self) -> IntegerSampler:
        """The noise table; it takes about 2 MB."""
        if self.noise is NoiseDistribution.SKELLAM:
            return skellam_sampler(self.variance)
        return discrete_gaussian_sampler(self.variance)


def example_mechanism(privacy: PrivacyParameters, dimension: int) -> ExampleMechanism:
    """The mechanism of a plan.

    Raises:
        InvalidParameters: the plan is of another mode, or there is nothing to train.
    """
    if privacy.example is None:
        raise InvalidParameters(f"mode {privacy.mode} does not hide examples")
    return mechanism_of(privacy.example, privacy.noise, dimension)


def mechanism_of(example: ExamplePrivacy, noise: NoiseDistribution, dimension: int) -> ExampleMechanism:
    """Chooses the grid: as fine as the largest noise table of a device allows.

    Raises:
        InvalidParameters: there is nothing to train.
    """
    if dimension < 1:
        raise InvalidParameters(f"a gradient has at least one element, got {dimension}")
    z = example.noise_multiplier
    radius = min(MAX_RADIUS, math.floor(MAX_LOCAL_STDDEV / z))
    return ExampleMechanism(example, noise, dimension, radius, (z * radius) ** 2)


def example_event(mechanism: ExampleMechanism, steps: int) -> DPEvent:
    """What `steps` steps cost one example of the device; nothing is said of the device."""
    skellam = mechanism.noise is NoiseDistribution.SKELLAM
    distance = skellam_distance if skellam else discrete_gaussian_distance
    return DPEvent(
        mechanism=Mechanism(mechanism.noise.value),
        mode=PrivacyMode.EXAMPLE,
        unit="example",
        noise_multiplier=mechanism.example.noise_multiplier,
        clip_norm=mechanism.example.clip_norm,
        sensitivity_squared=mechanism.radius**2,
        variance_per_share=mechanism.variance,
        dimension=mechanism.dimension,
        survivors=1,
        minimum_survivors=1,
        sampler_distance=distance(mechanism.variance),
        sums=steps,
        sampling_probability=mechanism.example.sampling_probability,
    )


def sampled(mechanism: ExampleMechanism, count: int, key: bytes) -> NDArray[np.int64]:
    """Which of `count` examples are in a step: each by an independent coin (Poisson sampling).

    A coin's probability is q rounded down to 2^-32, which costs no more than q. A batch is as large as the
    coins make it; none is cut, so that nothing has to be accounted for beside the coins.

    Args:
        key: 32 secret bytes, for this step's coins only.

    Returns:
        Ascending indices, int64.
    """
    threshold = math.floor(mechanism.example.sampling_probability * _WORDS)
    coins = Keystream(key).words(0, count).astype(np.int64)
    chosen: NDArray[np.int64] = np.flatnonzero(coins < threshold)
    return chosen


def quantised(mechanism: ExampleMechanism, gradient: NDArray[np.float32]) -> NDArray[np.int64]:
    """One example's gradient, clipped and on the grid.

    Coordinates are rounded towards 0, which never lengthens a vector: the sensitivity is the radius, and
    rounding costs no noise. It shortens a coordinate by half a step on average; the noise has thousands.
    A gradient that is not finite counts as 0: to stop because of it would tell that the example is there.

    Guarantee: the squared L2 norm of the integers is at most radius^2, checked on the integers.

    Args:
        gradient: float32, shape (d,).

    Returns:
        int64, shape (d,).
    """
    steps = gradient.astype(np.float64)
    norm = math.sqrt(float(np.dot(steps, steps)))
    if not math.isfinite(norm):
        return np.zeros(mechanism.dimension, np.int64)
    factor = clip_factor(norm, mechanism.example.clip_norm) * mechanism.scale
    while True:
        integers: NDArray[np.float64] = np.trunc(steps * factor)
        # Exact: squares of integers that add up to less than 2^53.
        if float(np.dot(integers, integers)) <= mechanism.radius**2:
            return integers.astype(np.int64)
        factor *= _SHRINK  # float rounding at the very rim of the ball


def noisy_gradient(
    mechanism: ExampleMechanism, total: NDArray[np.int64], count: int, key: bytes, sampler: IntegerSampler
) -> NDArray[np.float32]:
    """The step's gradient estimate: the sum of quantised gradients with noise, over the expected batch.

    Guarantee: with the noise of `mechanism.variance` in every coordinate, and nothing else of the sum.
    Assumes: the number of examples on the device is no secret, as the neighbouring relation has it: one
        example's gradients are replaced by zeros.

    Args:
        total: sum of `quantised` over the sampled examples, int64, shape (d,); not changed.
        count: examples on the device, sampled or not; at least 1.
        key: 32 secret bytes, for this step's noise only.
        sampler: `mechanism.sampler()`.

    Returns:
        float32, shape (d,).
    """
    noisy = total + sampler.sample(key, 0, mechanism.dimension)
    expected = mechanism.example.sampling_probability * count
    return (noisy / (mechanism.scale * expected)).astype(np.float32)


def run_steps(
    mechanism: ExampleMechanism,
    steps: int,
    count: int,
    secret: bytes,
    gradient: Callable[[int], NDArray[np.float32]],
    apply: Callable[[NDArray[np.float32]], None],
) -> None:
    """Trains by DP-SGD: each step's gradient estimate goes to `apply`, and nothing else leaves this function.

    Guarantee: what `apply` was given in all steps costs one example what `example_event` says.
    Assumes: `secret` is fresh for this training and kept by nobody; an example's gradient depends on no other
        example but through what `apply` was given.

    Args:
        mechanism: of the plan.
        steps: how many.
        count: examples on the device, at least 1.
        secret: 32 bytes.
        gradient: of the example with this index under the present weights, float32, shape (d,).
        apply: takes a step by a gradient estimate, float32, shape (d,).
    """
    sampler = mechanism.sampler()
    for step in range(steps):
        coins, noise = step_keys(secret, step)
        total = np.zeros(mechanism.dimension, np.int64)
        for index in sampled(mechanism, count, coins):
            total += quantised(mechanism, gradient(int(index)))
        apply(noisy_gradient(mechanism, total, count, noise, sampler))


def step_keys(secret: bytes, step: int) -> tuple[bytes, bytes]:
    """The keys of one step's coins and noise.

    Args:
        secret: 32 fresh bytes of one round's training.
        step: from 0.
    """
    context = step.to_bytes(8, "big")
    return (
        derive_key(secret, purpose="dp/example-coins", context=context),
        derive_key(secret, purpose="dp/example-noise", context=context),
    )
