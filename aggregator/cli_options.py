"""Options that several commands share, and the way to the service that they choose."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer
from pydantic import ValidationError

from aggregator import main as covey
from aggregator import profile as profiles
from aggregator.client import Client
from aggregator.refusals import OperationRefused
from aggregator.rounds.planning import GATHER_SECONDS
from aggregator.settings import DEFAULT_COHORT, DEFAULT_DELTA, given, invalid
from protocol.dp.parameters import PrivacyMode
from protocol.plan import SUBCOHORT_LIMIT, Deadlines

Command = Callable[..., Any]
_LIMITS = Deadlines()
_DEADLINES = "Deadlines"
_UNITS = {"m": 60, "h": 3600, "d": 86_400}

State = Annotated[
    Path,
    typer.Option(
        "--state",
        envvar="COVEY_STATE",
        file_okay=False,
        help="The aggregator's directory.",
        default_factory=covey.default_state,
        show_default="~/.local/state/covey",
    ),
]
SignKey = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        exists=True,
        dir_okay=False,
        help="Your Ed25519 key (PEM), where the fleet takes only what a publisher signed.",
        show_default=False,
    ),
]

Where = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="COVEY_STATE",
        file_okay=False,
        help="An aggregator's directory on this machine.",
        show_default="the service of `covey login`, else ~/.local/state/covey",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


WhichDevices = Annotated[
    str,
    typer.Option(
        "--where",
        help="Only devices that fit, such as `power=mains,battery>=50,label=site:barn`.",
        show_default="all devices",
    ),
]
OverSelect = Annotated[
    float,
    typer.Option(
        min=1.0, max=10.0, help="Invite so many times the cohort: the first to check in make the roster."
    ),
]

# --- of a round, whatever it asks

Cohort = Annotated[int, typer.Option(min=2, help="Devices in a full cohort.")]
Minimum = Annotated[
    int | None,
    typer.Option(min=2, help="Check-ins that a roster needs.", show_default="above 2/3 of a (sub-)cohort"),
]
MinSurvivors = Annotated[
    int | None,
    typer.Option(min=2, help="Masked inputs that a sum needs.", show_default="as many as --minimum"),
]
SubcohortLimit = Annotated[
    int, typer.Option(min=2, help="Split a larger cohort: its parts hide, and fail, by themselves.")
]
Mode = Annotated[PrivacyMode, typer.Option(help="Who adds noise: nobody, the aggregator, every device.")]
NoiseMultiplier = Annotated[
    float | None, typer.Option(min=0.0, help="Noise over sensitivity.", show_default="1 where there is noise")
]
Colluders = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Distributed mode: survivors that may reveal their noise; others make up.",
        show_default="0",
    ),
]
Delta = Annotated[
    float | None, typer.Option(help="The delta at which epsilon is stated.", show_default="1e-5")
]
MaxEpsilon = Annotated[
    float | None,
    typer.Option(help="Start no round that would take the fleet beyond it.", show_default="no limit"),
]
Gather = Annotated[
    float, typer.Option(min=0.0, help="Seconds to wait for a full cohort.", rich_help_panel=_DEADLINES)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Draws the cohorts.", show_default="random")]


# --- of training

Rounds = Annotated[
    int | None, typer.Option(min=1, help="How many rounds.", show_default="the model's recipe")
]
LocalEpochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over local data.", show_default="the model's recipe")
]
LearningRate = Annotated[
    float | None, typer.Option(help="Local learning rate.", show_default="the model's recipe")
]
ClipNorm = Annotated[
    float | None, typer.Option(help="L2 bound of one update.", show_default="the model's recipe")
]
AdaptiveClip = Annotated[
    float | None,
    typer.Option(help="Let C follow this quantile of the updates' norms.", show_default="C is fixed"),
]
Bits = Annotated[
    int | None,
    typer.Option(min=8, max=32, help="Bits of one coordinate on the wire.", show_default="by the cohort"),
]


def deadlines(
    advertise_seconds: Annotated[
        float, typer.Option(min=0.1, help="Check-in.", rich_help_panel=_DEADLINES)
    ] = _LIMITS.advertise_keys,
    share_seconds: Annotated[
        float, typer.Option(min=0.1, help="Exchange of shares.", rich_help_panel=_DEADLINES)
    ] = _LIMITS.share_keys,
    input_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Work on the device, and upload.",
            show_default=f"{_LIMITS.masked_input:g}; of a buffer, 60",
            rich_help_panel=_DEADLINES,
        ),
    ] = None,
    check_seconds: Annotated[
        float, typer.Option(min=0.1, help="Consistency check.", rich_help_panel=_DEADLINES)
    ] = _LIMITS.consistency_check,
    unmask_seconds: Annotated[
        float, typer.Option(min=0.1, help="Unmasking.", rich_help_panel=_DEADLINES)
    ] = _LIMITS.unmasking,
    offline_grace: Annotated[
        float,
        typer.Option(
            min=0.0, help="How long a device that is offline is waited for.", rich_help_panel=_DEADLINES
        ),
    ] = _LIMITS.offline_grace,
) -> Deadlines:
    """What the options say of a round's deadlines, in seconds; `masked_input` is set if one said it."""
    return Deadlines(
        **({} if input_seconds is None else {"masked_input": input_seconds}),
        advertise_keys=advertise_seconds,
        share_keys=share_seconds,
        consistency_check=check_seconds,
        unmasking=unmask_seconds,
        offline_grace=offline_grace,
    )


def options_of(factory: Callable[..., Any], argument: str) -> Callable[[Command], Command]:
    """Gives a command the options of `factory`, whose result it takes as `argument`.

    Args:
        factory: a function whose parameters are options; its ValidationError becomes the user's BadParameter.
        argument: name of the command's parameter that they stand in place of.
    """
    options = inspect.signature(factory, eval_str=True).parameters

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters

        @functools.wraps(command)
        def wrapped(**given: Any) -> Any:
            try:
                made = factory(**{name: given.pop(name) for name in options})
            except ValidationError as error:
                raise typer.BadParameter(str(invalid(error))) from error
            return command(**{argument: made}, **given)

        parameters = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            for each in (options.values() if name == argument else (parameter,))
        ]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapped

    return decorate


class AskedOnce(TypedDict):
    """What a query and an evaluation have in common, by the names of their requests' attributes."""

    where: str
    cohort: int
    minimum: int | None
    min_survivors: int | None
    subcohort_limit: int
    privacy: PrivacyMode
    noise_multiplier: float | None
    colluders: int
    delta: float
    epsilon_limit: float | None
    gather_seconds: float
    deadlines: Deadlines
    seed: int | None


@options_of(deadlines, "deadlines")
def asked_once(
    *,
    where: WhichDevices = "",
    cohort: Cohort = DEFAULT_COHORT,
    minimum: Minimum = None,
    min_survivors: MinSurvivors = None,
    subcohort_limit: SubcohortLimit = SUBCOHORT_LIMIT,
    privacy: Mode = PrivacyMode.DISTRIBUTED,
    noise_multiplier: NoiseMultiplier = None,
    colluders: Colluders = None,
    delta: Delta = None,
    max_epsilon: MaxEpsilon = None,
    seed: Seed = None,
    gather: Gather = GATHER_SECONDS,
    deadlines: Deadlines,
) -> AskedOnce:
    """What the options say of one round that trains nothing."""
    return AskedOnce(
        where=where,
        cohort=cohort,
        minimum=minimum,
        min_survivors=min_survivors,
        subcohort_limit=subcohort_limit,
        privacy=privacy,
        noise_multiplier=noise_multiplier,
        colluders=given(colluders, 0),
        delta=given(delta, DEFAULT_DELTA),
        epsilon_limit=max_epsilon,
        gather_seconds=gather,
        deadlines=deadlines,
        seed=seed,
    )


class Form(StrEnum):
    """What a command prints."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[Form, typer.Option("--output", help="What to print; --json is short for json.")]


@contextmanager
def service(state: Path | None) -> Iterator[Client]:
    """Opens the API: of a state directory that is named, else of `covey login`, else of the usual directory.

    Raises:
        UnusableProfile, Unreachable, NotInitialised, UnusableKeys, RepositoryError: it says what to do.
    """
    profile = profiles.load() if state is None else None
    if profile is None:
        with covey.connect(state or covey.default_state()) as client:
            yield client
    else:
        with Client(profile.url, profile.token, ca=profile.ca) as client:
            yield client


def seconds(text: str, most_days: int) -> float:
    """How long `30d`, `12h` or `90m` are.

    Raises:
        OperationRefused: it is none of these, or more than so many days.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    asked = 0 if found is None else int(found[1]) * _UNITS[found[2]]
    if not 0 < asked <= most_days * _UNITS["d"]:
        raise OperationRefused(f"{text} is no time: write 30d, 12h or 90m, at most {most_days}d")
    return float(asked)


def idle(state: Path | None) -> bool:
    """Whether the state directory that a command works on has no service; a remote one surely runs."""
    if state is None and profiles.load() is not None:
        return False
    return not covey.is_running(state or covey.default_state())
