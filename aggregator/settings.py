"""Campaign settings from a few figures: what is not said follows from the model's recipe and the cohort."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeVar

from pydantic import ConfigDict, ValidationError

from aggregator.optimizers import Server
from aggregator.rounds.planning import (
    EXAMPLE_METRIC,
    GATHER_SECONDS,
    PLAIN_METRICS,
    PRIVATE_METRICS,
    CampaignSettings,
    ServerStep,
)
from aggregator.rounds.selector import InvalidSelector, parse
from aggregator.schedule import UTC, schedule_of
from models.recipes import RECIPES, Recipe
from protocol.dp.parameters import (
    AdaptiveClipping,
    ExamplePrivacy,
    MetricSlot,
    PrivacyMode,
    PrivacyParameters,
    TreeNoise,
)
from protocol.plan import SUBCOHORT_LIMIT, CohortParameters, Deadlines, TrainingParameters
from protocol.ring import MAX_BITS
from protocol.secagg.parameters import GRINDING_BITS, GraphAssumptions
from protocol.secagg.subcohorts import Split

GENERIC = Recipe(rounds=10, local_epochs=1, learning_rate=0.05, clip_norm=1.0)
"""For a model without a recipe of its own."""

T = TypeVar("T")

DEFAULT_COHORT = 10
DEFAULT_NOISE_MULTIPLIER = 1.0
DEFAULT_DELTA = 1e-5
DEFAULT_EXAMPLE_CLIP_NORM = 1.0
DEFAULT_SAMPLING_PROBABILITY = 0.1
DEFAULT_REST_ROUNDS = 10
DEFAULT_STALENESS = 8
"""Of buffers: an update weighs a third then."""
BUFFER_DEADLINES = Deadlines(masked_input=60.0)
"""Nothing is trained in a buffer: a minute is for masking and the upload."""
DATA_BITS = 16
"""Bits of one coordinate before the sum of the cohort widens it."""


class InvalidSettings(ValueError):
    """Figures that make no campaign; the message says which."""


class Mode(StrEnum):
    """How devices and aggregator take turns.

    ROUNDS: a cohort trains, and everybody waits for its slowest member. BUFFERED: every device trains when it
    can, and a buffer is collected as soon as it is full (FedBuff).
    """

    ROUNDS = "rounds"
    BUFFERED = "buffered"


@dataclass(frozen=True)
class CampaignRequest:
    """What an operator asks for; None takes the default.

    Attributes:
        rounds: how many; by default the recipe's.
        cohort: devices in a full cohort.
        minimum: check-ins that a round needs; by default the smallest number above two thirds of the cohort.
        min_survivors: masked inputs that a sum needs; by default as many as `minimum`.
        privacy: who adds noise.
        colluders: distributed mode: survivors that may reveal their noise; that of the others suffices.
        adaptive_quantile: the clip norm follows this quantile of the update norms, from `clip_norm` on; fixed
            when None.
        bits: width of the ring; by default 16 and what the cohort's sum needs on top.
        gather_seconds: how long to wait for a full cohort when the minimum is there.
        epsilon_limit: no round starts that would take the fleet beyond it; not in mode example, which has no
            epsilon of a device: there every device has its own limit.
        restart_every: central mode: the noise is that of a tree over so many rounds (DP-FTRL); None gives
            every round noise of its own.
        example_clip_norm: mode example: L2 bound of one example's gradient; by default 1.
        sampling_probability: mode example: chance of an example to be in one step; by default 0.1.
        mode: rounds that train, or buffers of updates that were trained before.
        maximum_staleness: a device without the newest version may train from one so many older; how many
            versions an update may be behind the one that its buffer is added to. By default none, and 8.
        optimizer: how the mean update moves the model.
        server_learning_rate: of the optimizer; its own by default.
        schedule: cron expression that says when rounds are due; by default one follows on the other.
        time_zone: of the schedule, an IANA name.
        where: which devices, such as `power=mains,battery>=50`; everybody by default.
        rest_rounds: whoever was in one of so many rounds before yields to the others.
        over_select: invite so many times the cohort; the first to check in make the roster.
        seed: draws the cohorts; random by default.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    model: str
    rounds: int | None = None
    cohort: int = DEFAULT_COHORT
    minimum: int | None = None
    min_survivors: int | None = None
    subcohort_limit: int = SUBCOHORT_LIMIT
    local_epochs: int | None = None
    learning_rate: float | None = None
    proximal_mu: float | None = None
    mode: Mode = Mode.ROUNDS
    maximum_staleness: int | None = None
    privacy: PrivacyMode = PrivacyMode.NONE
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    colluders: int = 0
    adaptive_quantile: float | None = None
    bits: int | None = None
    delta: float = DEFAULT_DELTA
    deadlines: Deadlines | None = None
    gather_seconds: float = GATHER_SECONDS
    epsilon_limit: float | None = None
    restart_every: int | None = None
    example_clip_norm: float | None = None
    sampling_probability: float | None = None
    optimizer: Server = Server.FEDAVG
    server_learning_rate: float | None = None
    schedule: str | None = None
    time_zone: str = UTC
    where: str = ""
    rest_rounds: int = DEFAULT_REST_ROUNDS
    over_select: float = 1.0
    seed: int | None = None

    @property
    def recipe(self) -> Recipe:
        """The model's recipe, or the generic one."""
        return RECIPES.get(self.model, GENERIC)

    def resolve(self) -> tuple[int, CampaignSettings]:
        """Fills in what was not said; returns (rounds, settings).

        Raises:
            InvalidSettings: it says what is wrong.
        """
        recipe = self.recipe
        rounds = given(self.rounds, recipe.rounds)
        if rounds < 1:
            raise InvalidSettings("a campaign has at least one round")
        buffered = self.mode is Mode.BUFFERED
        try:
            privacy = self._privacy()
            settings = CampaignSettings(
                asks=TrainingParameters(
                    local_epochs=given(self.local_epochs, recipe.local_epochs),
                    learning_rate=given(self.learning_rate, recipe.learning_rate),
                    proximal_mu=given(self.proximal_mu, recipe.proximal_mu),
                    maximum_staleness=given(self.maximum_staleness, DEFAULT_STALENESS if buffered else 0),
                ),
                privacy=privacy,
                cohort=cohort_of(self.cohort, self.minimum, self.min_survivors, self.subcohort_limit),
                deadlines=given(self.deadlines, BUFFER_DEADLINES if buffered else Deadlines()),
                gather_seconds=self.gather_seconds,
                selection_seed=seed_of(self.seed),
                server=ServerStep(optimizer=self.optimizer, learning_rate=self.server_learning_rate),
                schedule=schedule_of(self.schedule, self.time_zone),
                where=parse(self.where),
                rest_rounds=self.rest_rounds,
                over_select=self.over_select,
                buffered=buffered,
                epsilon_limit=self.epsilon_limit,
            )
        except ValidationError as error:
            raise invalid(error) from error
        except InvalidSelector as error:
            raise InvalidSettings(f"where: {error}") from error
        return rounds, settings

    def _privacy(self) -> PrivacyParameters:
        example: ExamplePrivacy | None = None
        slots: tuple[MetricSlot, ...] = PRIVATE_METRICS
        noise = given(self.noise_multiplier, DEFAULT_NOISE_MULTIPLIER)
        if self.privacy is PrivacyMode.NONE:
            slots, noise = PLAIN_METRICS, given(self.noise_multiplier, 0.0)
        if self.privacy is PrivacyMode.EXAMPLE:
            if self.epsilon_limit is not None:
                raise InvalidSettings(
                    "mode example has no epsilon of a device: every device has its own limit"
                )
            # The noise is each device's, in its own steps; the sum of the updates gets none.
            example = ExamplePrivacy(
                clip_norm=given(self.example_clip_norm, DEFAULT_EXAMPLE_CLIP_NORM),
                noise_multiplier=noise,
                sampling_probability=given(self.sampling_probability, DEFAULT_SAMPLING_PROBABILITY),
            )
            slots, noise = EXAMPLE_METRIC, 0.0
        elif self.example_clip_norm is not None or self.sampling_probability is not None:
            raise InvalidSettings("a clip norm of examples and their sampling belong to mode example")
        return PrivacyParameters(
            mode=self.privacy,
            clip_norm=given(self.clip_norm, self.recipe.clip_norm),
            noise_multiplier=noise,
            delta=self.delta,
            bits=given(self.bits, min(MAX_BITS, DATA_BITS + math.ceil(math.log2(max(2, self.cohort))))),
            colluders=colluders_of(self.colluders, self.privacy),
            adaptive=None
            if self.adaptive_quantile is None
            else AdaptiveClipping(quantile=self.adaptive_quantile),
            metric_slots=slots,
            example=example,
            tree=None if self.restart_every is None else TreeNoise(restart_every=self.restart_every),
        )


def cohort_of(
    size: int, minimum: int | None, survivors: int | None, subcohort_limit: int
) -> CohortParameters:
    """A cohort from what was said of it; by default, both minima are above two thirds of a sub-cohort.

    Raises:
        ValidationError: it makes no cohort.
    """
    part = Split.of(max(1, size), max(1, subcohort_limit)).average
    least = given(minimum, max(2, min(part, 2 * part // 3 + 1)))
    return CohortParameters(
        size=size,
        minimum=least,
        minimum_survivors=given(survivors, least),
        subcohort_limit=subcohort_limit,
        graph=GraphAssumptions(grinding_bits=GRINDING_BITS),
    )


def colluders_of(colluders: int, mode: PrivacyMode) -> int:
    """The survivors that may reveal their noise.

    Raises:
        InvalidSettings: devices share no noise in this mode.
    """
    if colluders and mode is not PrivacyMode.DISTRIBUTED:
        raise InvalidSettings("colluders belong to mode distributed: in no other do devices share the noise")
    return colluders


def invalid(error: ValidationError) -> InvalidSettings:
    """The first thing that is wrong, in a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return InvalidSettings(f"{where}: {first['msg']}" if where else first["msg"])


def given(value: T | None, default: T) -> T:
    """The value, or its default."""
    return default if value is None else value


def seed_of(seed: int | None) -> bytes:
    """The seed that cohorts are drawn from: of a number that can be said again, or random."""
    if seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(b"covey/v1/selection" + str(seed).encode()).digest()
