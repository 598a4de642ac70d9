"""What a campaign in mode example would cost one example of a device, before any data is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import ValidationError

from aggregator.privacy.budget import Budget
from aggregator.privacy.solving import NoiseUnsolvable
from protocol.dp.accounting import Spent, spend
from protocol.dp.errors import InvalidParameters
from protocol.dp.example import ExampleMechanism, example_event, mechanism_of
from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution

_GRID = 1e-3  # solved multipliers are rounded up to it
_MOST = 64.0  # `ExamplePrivacy.noise_multiplier`


@dataclass(frozen=True)
class ExampleIntention:
    """What somebody thinks of running in mode example.

    Attributes:
        rounds: that one device takes part in.
        local_epochs: of each.
        sampling_probability: of an example, for one step.
        delta: the delta at which epsilon is stated.
        epsilon: what the rounds may cost one example; None when the noise multiplier is given.
        noise_multiplier: z; None when it is to be solved for.
        clip_norm: of one example's gradient.
        dimension: parameters of the model.
    """

    rounds: int
    local_epochs: int
    sampling_probability: float
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float = 1.0
    dimension: int = 50_000
    noise: NoiseDistribution = NoiseDistribution.SKELLAM


@dataclass(frozen=True)
class ExampleForecast:
    """An intention with what follows from it; every epsilon is that of one example.

    Attributes:
        steps: of DP-SGD in a round.
        per_round: of one round.
        total: of all rounds.
        unsampled: of all rounds, had the coins been seen.
    """

    intention: ExampleIntention
    mechanism: ExampleMechanism
    steps: int
    per_round: Spent
    total: Spent
    unsampled: Spent

    def noise_norm(self, examples: int) -> float:
        """Expected L2 norm of the noise in one step's gradient, on a device with so many examples."""
        example = self.mechanism.example
        batch = example.sampling_probability * examples
        return example.noise_multiplier * example.clip_norm * math.sqrt(self.mechanism.dimension) / batch


def forecast_examples(intention: ExampleIntention) -> ExampleForecast:
    """Works out an intention.

    Raises:
        NoiseUnsolvable: no noise reaches the epsilon.
        InvalidParameters: any other figure that makes no campaign.
    """
    if (intention.epsilon is None) == (intention.noise_multiplier is None):
        raise InvalidParameters("give either an epsilon to reach or a noise multiplier")
    if intention.rounds < 1 or intention.local_epochs < 1:
        raise InvalidParameters(
            f"need at least one round and epoch, got {intention.rounds}, {intention.local_epochs}"
        )
    z = intention.noise_multiplier
    if z is None:
        assert intention.epsilon is not None  # noqa: S101 - one of the two is given
        z = _solved(intention, Budget(intention.epsilon, intention.delta))
    mechanism, steps = _mechanism(intention, z)
    event = example_event(mechanism, steps)
    certain = event.model_copy(update={"sampling_probability": 1.0})
    return ExampleForecast(
        intention,
        mechanism,
        steps,
        per_round=spend({event: 1}, intention.delta),
        total=spend({event: intention.rounds}, intention.delta),
        unsampled=spend({certain: intention.rounds}, intention.delta),
    )


def _mechanism(intention: ExampleIntention, z: float) -> tuple[ExampleMechanism, int]:
    try:
        example = ExamplePrivacy(
            clip_norm=intention.clip_norm,
            noise_multiplier=z,
            sampling_probability=intention.sampling_probability,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidParameters(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    mechanism = mechanism_of(example, intention.noise, intention.dimension)
    return mechanism, example.steps(intention.local_epochs)


def _solved(intention: ExampleIntention, budget: Budget) -> float:
    def too_little(steps: int) -> bool:
        mechanism, count = _mechanism(intention, steps * _GRID)
        return (
            spend({example_event(mechanism, count): intention.rounds}, budget.delta).epsilon > budget.epsilon
        )

    low, high = round(0.01 / _GRID), round(_MOST / _GRID)
    if too_little(high):
        raise NoiseUnsolvable(f"no noise multiplier up to {_MOST:g} reaches epsilon {budget.epsilon:g}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return high * _GRID
