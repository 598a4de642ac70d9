"""Options that several commands share, and the way to the service that they choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aggregator import main as covey
from aggregator import profile as profiles
from aggregator.client import Client

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


def idle(state: Path | None) -> bool:
    """Whether the state directory that a command works on has no service; a remote one surely runs."""
    if state is None and profiles.load() is not None:
        return False
    return not covey.is_running(state or covey.default_state())
