"""What secure aggregation costs a client and the server, next to its floor and to Flower's SecAgg+.

    python benchmarks/secagg.py [--json FILE]            the cases of the table, and growth in the cohort
    python benchmarks/secagg.py --n 10 --d 1000000       one case

Times are CPU seconds of one thread, the fastest of a few repeats; ratios are of figures of one run. The floor
of a client is k + 1 raw ChaCha20 keystreams and additions of length d; that of the server n additions, and a
keystream and an addition for every mask that remains. Frames to messages and back is reported apart: neither
the floor nor the peer has it. Flower needs `make bench-peers`; without it, its columns are empty.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from math import log
from pathlib import Path

if __package__ in {None, ""}:  # run as a file: the repository is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.secagg_case import Case, Outcome, cores, run
from benchmarks.secagg_counts import counts

CASES = (
    Case(10, 10**6, complete=True, peer_server=True, repeats=7, rounds=5),
    Case(10, 11_700_000, complete=True, peer_server=True, repeats=3, rounds=2),
    Case(100, 10**5, complete=True, peer_server=True, repeats=5, rounds=3),
    Case(1000, 10**6, repeats=2),
)
GROWTH = (
    Case(100, 10**5, peer_client=False, repeats=5, rounds=3),
    Case(1000, 10**5, peer_client=False, repeats=3),
    Case(10_000, 10**5, peer_client=False, repeats=1),
)
"""One more than a table's case: the same length on the regular graph, for three sizes of cohort."""


def milliseconds(seconds: float | None) -> str:
    """Three figures are enough."""
    return "" if seconds is None else f"{1e3 * seconds:,.1f}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def times(ratio: float | None) -> str:
    """A ratio, or nothing where it was not run."""
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def cases_table(outcomes: Sequence[Outcome], *, warm: bool) -> Table:
    """One line a case: of devices that never met, or with the certificates of an earlier round."""
    which = "certificates known from an earlier round" if warm else "every certificate is new"
    of = "_warm" if warm else ""
    table = Table(title=f"Secure aggregation, CPU ms (one thread): {which}", header_style="bold")
    for column in (
        "n",
        "d",
        "graph",
        "client",
        "floor",
        "Flower",
        "server",
        "floor",
        "Flower",
        "peak",
        "upload",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        row, case = outcome.to_json(), outcome.case
        table.add_row(
            f"{case.n:,}",
            f"{case.d:,}",
            row["graph"],
            milliseconds(row[f"client{of}_cpu_s"]),
            times(row[f"client{of}_over_floor"]),
            times(row[f"client{of}_speedup_vs_flower"]),
            milliseconds(row[f"server{of}_cpu_s"]),
            times(row[f"server{of}_over_floor"]),
            times(row[f"server{of}_speedup_vs_flower"]),
            f"{row['server_peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['upload_bytes'] / 1e6:,.2f} MB",
        )
    table.caption = (
        "floor: times the floor of the same run; Flower: times as fast as Flower 1.41, where run; "
        "peak: resident memory of the server's process and its workers, interpreters included"
    )
    return table


def parts_table(outcomes: Sequence[Outcome], side: str) -> Table:
    """Where the time goes, a column a case."""
    table = Table(title=f"{side.capitalize()} by part, CPU ms", header_style="bold")
    table.add_column("part", no_wrap=True)
    for outcome in outcomes:
        table.add_column(f"n={outcome.case.n:,}\nd={outcome.case.d:,}", justify="right")
    columns = [(o.client if side == "client" else o.server).parts for o in outcomes]
    for part in dict.fromkeys(part for column in columns for part in column):
        table.add_row(part, *(milliseconds(column.get(part)) for column in columns))
    table.add_section()
    floors = [o.client_floor_s if side == "client" else o.server_floor_s for o in outcomes]
    table.add_row("floor", *(milliseconds(seconds) for seconds in floors))
    saved = [o.warm_saving_s if side == "client" else o.server.warm_saving_s for o in outcomes]
    table.add_row("less, with certificates of an earlier round", *(milliseconds(s) for s in saved))
    if side == "server":
        walls = [o.server.parallel_wall_s for o in outcomes]
        table.add_row(f"remove masks, wall time in 2 processes, {cores()} cores", *map(milliseconds, walls))
    return table


def energy_table(outcomes: Sequence[Outcome]) -> Table:
    """Counts that do not depend on the machine: what a device's battery pays for."""
    table = Table(title="Work by count (what energy follows from)", header_style="bold")
    table.add_column("count", no_wrap=True)
    for outcome in outcomes:
        table.add_column(f"n={outcome.case.n:,}\nd={outcome.case.d:,}", justify="right")
    columns = [counts(outcome.case, outcome.server.masks) for outcome in outcomes]
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:,}" for column in columns))
    return table


def growth_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """How cost grows between cohort sizes: the server's exponent of n, and a client's multiple of log n."""
    lines = []
    for small, large in [*pairwise(outcomes), (outcomes[0], outcomes[-1])]:
        scale = log(large.case.n / small.case.n)
        exponent = log(large.server.cpu_s / small.server.cpu_s) / scale
        floor = log(large.server_floor_s / small.server_floor_s) / scale
        client = (large.client.cpu_s / small.client.cpu_s) / (log(large.case.n) / log(small.case.n))
        lines.append(
            f"n {small.case.n:,} to {large.case.n:,}, k {small.case.graph.degree} to "
            f"{large.case.graph.degree}: server n^{exponent:.2f} (its floor n^{floor:.2f}), "
            f"client {client:.2f} times what log n gives"
        )
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, help="clients of a single case")
    parser.add_argument("--d", type=lambda text: int(float(text)), help="elements of a single case")
    parser.add_argument("--dropout", type=float, default=0.1, help="share that uploads nothing (0.1)")
    parser.add_argument("--complete", action="store_true", help="complete graph although n is over 64")
    parser.add_argument("--no-peer", action="store_true", help="leave Flower out")
    parser.add_argument("--no-growth", action="store_true", help="leave the growth cases out")
    parser.add_argument("--json", type=Path, help="write the cases as JSON to this file")
    options = parser.parse_args(arguments)
    if (options.n is None) != (options.d is None):
        parser.error("--n and --d belong together")
    if options.n is not None and (options.n < 3 or options.d < 1 or not 0 <= options.dropout < 0.3):
        parser.error("a case has --n from 3, --d from 1 and --dropout below 0.3, so that a quorum survives")
    return options


def chosen(options: argparse.Namespace) -> tuple[Case, ...]:
    """The cases that the command line asks for."""
    if options.n is not None:
        # Flower's server takes minutes at n = 100 already, and hours beyond.
        small = options.n <= 100
        rounds = 3 if small else 1
        complete = options.complete or options.n <= 64
        repeats = 5 if options.n * options.d <= 10**8 else 2
        return (Case(options.n, options.d, options.dropout, complete, True, small, repeats, rounds),)
    return CASES if options.no_growth else (*CASES, *GROWTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases, prints the tables and writes the JSON file."""
    options, console = parse(arguments), Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a log has room
    outcomes: list[Outcome] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    with bar:
        for case in chosen(options):
            title = f"n={case.n:,} d={case.d:,}"
            task = bar.add_task(title, total=1.0)
            outcomes.append(
                run(
                    case,
                    lambda step, part, task=task, title=title: bar.update(  # type: ignore[misc]
                        task, description=f"{title}: {step}", completed=part
                    ),
                    peer=not options.no_peer,
                )
            )
            bar.remove_task(task)
    for warm in (False, True):
        console.print(cases_table(outcomes, warm=warm))
    for side in ("client", "server"):
        console.print(parts_table(outcomes, side))
    console.print(energy_table(outcomes))
    grown = [outcome for outcome in outcomes if outcome.case in GROWTH]
    if len(grown) == len(GROWTH):
        console.print("Growth at d = 100,000 on the regular graph:", style="bold")
        for line in growth_lines(grown):
            console.print("  " + line, highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps([outcome.to_json() for outcome in outcomes], indent=2) + "\n")
        console.print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
