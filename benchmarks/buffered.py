"""What a straggler costs: updates an hour in rounds and in buffers, in simulated time.

    python benchmarks/buffered.py [--json FILE] [--hours H] [--devices N] [--buffer K] [--minutes M]
                                  [--factor F]

The real service and the real core of every device run in one process. Training takes simulated time: about M
minutes (0.7 M to 1.3 M, evenly spread), and F times as long on one device; every step of the protocol takes a
second. Rounds invite all devices, and wait for the last one or give up on it after twice the usual time.
Counted are the updates that made versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from aggregator.settings import Mode
from protocol.plan import Deadlines
from tests.buffer_bench import BufferBench, buffered

STEP_SECONDS = 1.0


@dataclass(frozen=True)
class Throughput:
    """What came of one way to take turns.

    Attributes:
        way: how devices and aggregator take turns.
        straggler: how many times as long as the others one device trains; 1 for none.
        updates: in versions, an hour.
        versions: made, an hour.
        weight: sum of the weights of these updates, an hour.
        of_straggler: updates of the straggler, an hour.
        oldest: largest staleness of an update.
    """

    way: str
    straggler: float
    updates: float
    versions: float
    weight: float
    of_straggler: float
    oldest: int


def measure(way: str, arguments: argparse.Namespace, straggler: float) -> Throughput:
    """Runs a campaign for so many simulated hours."""
    usual = 60.0 * arguments.minutes
    seconds = [float(each) for each in usual * np.linspace(0.7, 1.3, arguments.devices)]
    seconds[-1] = usual * straggler
    request = buffered(10_000, arguments.buffer, maximum_staleness=100)
    if way != "buffers":
        # Rounds that wait for the straggler, or that give up on it after twice the usual time.
        patience = 2 * usual if way == "rounds, short deadline" else 1.5 * usual * straggler
        request = replace(
            request,
            mode=Mode.ROUNDS,
            cohort=arguments.devices,
            maximum_staleness=None,
            deadlines=Deadlines(masked_input=patience),
        )
    with tempfile.TemporaryDirectory(prefix="covey-buffered-") as directory:
        bench = BufferBench(Path(directory), seconds)
        bench.start(request)
        end = 3600.0 * arguments.hours
        while bench.clock.now < end:
            bench.step(STEP_SECONDS)
        views = [view for view in bench.rounds() if view.record.status == "completed"]
        ages = [(name, age) for view in views for name, age in bench.staleness(view).items()]
        bench.close()
    hours = arguments.hours
    return Throughput(
        way,
        straggler,
        updates=sum(len(view.report.survivors) for view in views) / hours,
        versions=len(views) / hours,
        weight=sum((1 + age) ** -0.5 for _, age in ages) / hours,
        of_straggler=sum(name == f"device-{arguments.devices - 1}" for name, _ in ages) / hours,
        oldest=max((age for _, age in ages), default=0),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--hours", type=float, default=2.0, help="simulated hours")
    parser.add_argument("--devices", type=int, default=12)
    parser.add_argument("--buffer", type=int, default=4, help="updates of a buffer")
    parser.add_argument("--minutes", type=float, default=2.0, help="that a device trains")
    parser.add_argument(
        "--factor", type=float, default=10.0, help="how many times as long the straggler takes"
    )
    options = parser.parse_args(arguments)
    found = [
        measure(way, options, straggler)
        for straggler in (1.0, options.factor)
        for way in ("rounds", "rounds, short deadline", "buffers")
        if straggler > 1 or way != "rounds, short deadline"
    ]
    table = Table("", "straggler", "updates/h", "weighed", "versions/h", "its own/h", "oldest")
    for each in found:
        row = (each.updates, each.weight, each.versions, each.of_straggler)
        figures = (f"{value:.1f}" for value in row)
        name = "none" if each.straggler == 1 else f"{each.straggler:g} x"
        table.add_row(each.way, name, *figures, str(each.oldest))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
