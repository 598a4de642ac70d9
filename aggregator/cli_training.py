"""The options of every command that asks for rounds of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from aggregator.cli_options import (
    AdaptiveClip,
    Bits,
    ClipNorm,
    Colluders,
    Delta,
    Gather,
    LearningRate,
    LocalEpochs,
    MaxEpsilon,
    Minimum,
    MinSurvivors,
    NoiseMultiplier,
    OverSelect,
    Rounds,
    Seed,
    SubcohortLimit,
    WhichDevices,
    deadlines,
    options_of,
)
from aggregator.operations import OperationRefused
from aggregator.optimizers import Server
from aggregator.rounds.planning import GATHER_SECONDS
from aggregator.settings import (
    BUFFER_DEADLINES,
    DEFAULT_COHORT,
    DEFAULT_DELTA,
    DEFAULT_REST_ROUNDS,
    DEFAULT_STALENESS,
    CampaignRequest,
    Mode,
    given,
    invalid,
)
from protocol.dp.parameters import PrivacyMode
from protocol.plan import SUBCOHORT_LIMIT, Deadlines

MAX_PLAN_BYTES = 1_000_000


class PlannedPrivacy(BaseModel):
    """The figures of `covey privacy plan --json` that a campaign takes over."""

    model_config = ConfigDict(frozen=True)

    mode: PrivacyMode
    rounds: int
    delta: float
    noise_multiplier: float
    clip_norm: float
    cohort: int | None = None
    min_survivors: int
    bits: int | None
    restart_every: int | None = None
    sampling_probability: float | None = None
    colluders: int = 0
    noise: Literal["skellam"]
    """The noise of every round that a campaign asks for: a plan of another is no plan of it."""

    @classmethod
    def load(cls, path: Path) -> PlannedPrivacy:
        """Reads a plan.

        Raises:
            BadParameter: it cannot be read.
            OperationRefused: it says what is wrong with it.
        """
        try:
            with path.open("rb") as file:
                return cls.model_validate_json(file.read(MAX_PLAN_BYTES))
        except OSError as error:
            modes = ", ".join(PrivacyMode)
            raise typer.BadParameter(
                f"one of {modes}, or a file that can be read: {path}: {error.strerror}",
                param_hint="--privacy",
            ) from error
        except ValidationError as error:
            raise OperationRefused(
                f"{path} is not what `covey privacy plan --json` writes: {invalid(error)}"
            ) from error


@options_of(deadlines, "deadlines")
def campaign_request(
    *,
    model: Annotated[str, typer.Option(help="The model to train.")],
    deadlines: Deadlines,
    rounds: Rounds = None,
    cohort: Annotated[
        int | None, typer.Option(min=2, help="Devices in a full cohort.", show_default="10, or the plan's")
    ] = None,
    minimum: Minimum = None,
    min_survivors: MinSurvivors = None,
    subcohort_limit: SubcohortLimit = SUBCOHORT_LIMIT,
    local_epochs: LocalEpochs = None,
    lr: LearningRate = None,
    privacy: Annotated[
        str,
        typer.Option(
            metavar="MODE|FILE",
            help="Who adds noise: none, central, distributed, local, example; or what "
            "`covey privacy plan --json` wrote, whose figures count where no option says otherwise.",
        ),
    ] = "none",
    noise_multiplier: NoiseMultiplier = None,
    clip_norm: ClipNorm = None,
    colluders: Colluders = None,
    adaptive_clip: AdaptiveClip = None,
    bits: Bits = None,
    delta: Delta = None,
    max_epsilon: MaxEpsilon = None,
    restart_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Central mode: noise of a tree over so many rounds (DP-FTRL); no device is in two of them.",
            show_default="every round has noise of its own",
        ),
    ] = None,
    example_clip: Annotated[
        float | None, typer.Option(help="Mode example: L2 bound of one example's gradient.", show_default="1")
    ] = None,
    sampling: Annotated[
        float | None,
        typer.Option(help="Mode example: chance of an example to be in one step.", show_default="0.1"),
    ] = None,
    gather: Gather = GATHER_SECONDS,
    optimizer: Annotated[
        Server, typer.Option(help="How the mean update of a round moves the model.")
    ] = Server.FEDAVG,
    server_learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of the optimizer.", show_default="1; of the adaptive ones, 0.1"),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="`rounds`: a cohort trains and its slowest device is waited for. `buffered`: devices train "
            "when they can, and a buffer of updates is collected as soon as it is full (FedBuff).",
            rich_help_panel="Asynchronous",
        ),
    ] = Mode.ROUNDS,
    buffer: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Updates that make a new version, in mode buffered.",
            show_default="as --cohort",
            rich_help_panel="Asynchronous",
        ),
    ] = None,
    max_staleness: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            help="How many versions an update may be behind; it weighs 1/sqrt(1+s).",
            show_default=f"0; in mode buffered, {DEFAULT_STALENESS}",
            rich_help_panel="Asynchronous",
        ),
    ] = None,
    fedprox_mu: Annotated[
        float | None,
        typer.Option(min=0.0, help="Weight of FedProx on the devices.", show_default="the model's recipe"),
    ] = None,
    seed: Seed = None,
    where: WhichDevices = "",
    rest: Annotated[
        int, typer.Option(min=0, max=1000, help="Who was in one of so many rounds before yields to others.")
    ] = DEFAULT_REST_ROUNDS,
    over_select: OverSelect = 1.0,
) -> CampaignRequest:
    """What the options ask for.

    Raises:
        BadParameter, OperationRefused: the privacy is neither a mode nor a plan.
    """
    if buffer is not None:
        if mode is not Mode.BUFFERED or cohort is not None:
            raise typer.BadParameter("goes with --mode buffered, in place of --cohort", param_hint="--buffer")
        cohort = buffer
    noise = PrivacyMode(privacy) if privacy in set(PrivacyMode) else None
    plan = None if noise is not None else PlannedPrivacy.load(Path(privacy))
    if plan is not None:
        noise = plan.mode
        rounds, cohort, delta = given(rounds, plan.rounds), cohort or plan.cohort, given(delta, plan.delta)
        noise_multiplier = given(noise_multiplier, plan.noise_multiplier)
        if noise is PrivacyMode.EXAMPLE:
            # Its clip norm is that of an example, and no fewest survivors matter to an example.
            example_clip = given(example_clip, plan.clip_norm)
            sampling = sampling if sampling is not None else plan.sampling_probability
        else:
            clip_norm = given(clip_norm, plan.clip_norm)
            colluders = given(colluders, plan.colluders)
            bits = bits if bits is not None else plan.bits
            min_survivors = given(min_survivors, plan.min_survivors)
            minimum = given(minimum, min_survivors)
            restart_every = restart_every if restart_every is not None else plan.restart_every
    if mode is Mode.BUFFERED and "masked_input" not in deadlines.model_fields_set:
        deadlines = deadlines.model_copy(update={"masked_input": BUFFER_DEADLINES.masked_input})
    return CampaignRequest(
        model=model,
        rounds=rounds,
        cohort=given(cohort, DEFAULT_COHORT),
        minimum=minimum,
        min_survivors=min_survivors,
        subcohort_limit=subcohort_limit,
        local_epochs=local_epochs,
        learning_rate=lr,
        proximal_mu=fedprox_mu,
        mode=mode,
        maximum_staleness=max_staleness,
        privacy=given(noise, PrivacyMode.NONE),
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        colluders=given(colluders, 0),
        adaptive_quantile=adaptive_clip,
        bits=bits,
        delta=given(delta, DEFAULT_DELTA),
        deadlines=deadlines,
        gather_seconds=gather,
        epsilon_limit=max_epsilon,
        restart_every=restart_every,
        example_clip_norm=example_clip,
        sampling_probability=sampling,
        optimizer=optimizer,
        server_learning_rate=server_learning_rate,
        where=where,
        rest_rounds=rest,
        over_select=over_select,
        seed=seed,
    )


training_options = options_of(campaign_request, "request")
"""Gives a command the options of training; it takes them as `request`."""
