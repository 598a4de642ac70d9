"""The command `covey audit`: a transcript checked by itself, without any service."""

from __future__ import annotations

import json as json_module
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from aggregator import cli_output as output
from aggregator import main as covey
from aggregator.cli_options import Json, State
from aggregator.operations import OperationRefused
from protocol.dp.accounting import Spent
from protocol.transcript import MAX_RECORD_BYTES, BrokenTranscript

MAX_RECORDS = 1_000_000


def audit(
    state: State,
    transcript: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="What --out wrote.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the transcript of --state here, for others to check."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Digest that the newest record must have, as kept elsewhere.", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    json: Json = False,
) -> None:
    """Verifies a transcript's chain and re-computes from it alone what privacy was spent.

    Without a file, that of --state. A file can be checked by anybody: it holds digests and counts, no names
    of devices. Whoever kept an earlier head finds out a transcript that was rewritten as a whole. Exit code 1
    when it does not verify.

    Examples:

      covey audit --state agg --out transcript.jsonl

      covey audit transcript.jsonl --head 3f0c...
    """
    from aggregator.privacy.ledger import audit_transcript, head_of, whole_transcript

    try:
        if transcript is None:
            with covey.open_operator(state) as operator, operator.repository.read() as reader:
                lines = whole_transcript(reader)
        else:
            lines = _read(transcript)
        found = audit_transcript(lines, delta)
    except BrokenTranscript as error:
        raise OperationRefused(f"the transcript cannot be trusted: {error}") from error
    newest = head_of(lines)
    if head is not None and head.lower() != newest:
        raise OperationRefused(f"the newest record is {newest}, not {head}: the transcript is another one")
    if out is not None:
        out.write_bytes(b"".join(line + b"\n" for line in lines))
    if json:
        content = {
            "head": newest,
            "rounds": found.rounds,
            "delta": delta,
            "population": _figures(found.population),
            "models": {name: _figures(spent) for name, spent in found.models.items()},
            "queries": _figures(found.queries),
        }
        sys.stdout.write(json_module.dumps(content) + "\n")
        return
    output.line(f"the chain of {found.rounds} rounds holds; its head is {newest}")
    for name, spent in (("all", found.population), *found.models.items(), ("queries", found.queries)):
        output.line(f"{name:16}  {spent.rounds:4} releases  epsilon {spent.epsilon:.4g}, delta {delta:g}")


def _figures(spent: Spent) -> dict[str, float | int | None]:
    """For JSON, which has no infinity: null where nothing is promised."""
    return {"epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None, "releases": spent.rounds}


def _read(path: Path) -> list[bytes]:
    """The records of a file, one a line.

    Raises:
        BrokenTranscript: a line, or the file, is too long.
    """
    lines: list[bytes] = []
    with path.open("rb") as file:
        while line := file.readline(MAX_RECORD_BYTES + 2):
            if len(lines) == MAX_RECORDS or not line.endswith(b"\n"):
                raise BrokenTranscript(f"line {len(lines) + 1} is cut off or too long, or there are too many")
            lines.append(line[:-1])
    return lines
