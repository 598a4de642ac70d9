"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator import main as covey

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
