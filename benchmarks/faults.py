"""What is lost when a part is killed at a boundary of a round: real processes, SIGKILL, every boundary.

    python benchmarks/faults.py [--json FILE] [--victim NAME]... [--of NAME]...

A round has transactions that move it on: it begins, takes an input, closes its five phases, ends. A buffer
(`--mode buffered`) has more: devices are ordered to train, their updates are admitted, it is full, and they
are ordered anew. Each is hit just before its commit and just after, when nothing that follows from it has
been sent. The victim comes back half a second later, and two rounds must end. Lost is what devices were told
and the aggregator has not: acknowledged uploads that are not in the exact sum, versions, and ledger entries
of rounds that unmasked. For rollouts, see `benchmarks/faults_rollouts.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from aggregator import main as covey
from aggregator.repository import RepositoryError
from aggregator.settings import CampaignRequest, Mode
from benchmarks.faults_outcome import Outcome
from benchmarks.faults_rollouts import run_rollout_case
from benchmarks.faults_service import BOUNDARIES, BUFFER_BOUNDARIES, ROLLOUT_BOUNDARIES, SIDES, Trap
from deploy.broker import BrokerProcess
from protocol.dp.parameters import PrivacyMode
from protocol.plan import Deadlines
from tests.aggregator_process import COMMAND, ServiceProcess, SimulatedFleet
from tests.databases import PostgresProcess, find_postgresql, postgresql
from tests.round_losses import count_losses

VICTIMS = ("aggregator", "broker", "postgresql")
KINDS = ("rounds", "buffers", "rollouts")
PARAMETERS = 60_000
SECONDS = 120.0
REQUEST = CampaignRequest(
    "toy",
    rounds=2,
    cohort=4,
    minimum=3,
    min_survivors=3,
    privacy=PrivacyMode.DISTRIBUTED,
    noise_multiplier=1.0,
    gather_seconds=10.0,
    deadlines=Deadlines(
        advertise_keys=30, share_keys=30, masked_input=30, consistency_check=30, unmasking=30, offline_grace=8
    ),
)


BUFFERED = replace(REQUEST, mode=Mode.BUFFERED)


def run_case(
    boundary: str, side: str, victim: str, server: PostgresProcess | None, *, buffered: bool = False
) -> Outcome:
    """Runs two rounds, or buffers, and kills the victim in the first."""
    with tempfile.TemporaryDirectory(prefix="covey-faults-") as directory, ExitStack() as stack:
        mark, state = Path(directory) / "struck", Path(directory) / "state"
        with _database(server if victim == "postgresql" else None):
            covey.init(state, fleet="orchard")
        broker = stack.enter_context(BrokerProcess("mosquitto"))
        trap = Trap(
            boundary,
            side,
            str(mark),
            broker=broker.pid if victim == "broker" else 0,
            postgres=(str(server.programs), str(server.directory))
            if server is not None and victim == "postgresql"
            else None,
        )
        fleet = stack.enter_context(
            SimulatedFleet(state, broker.host, broker.port, devices=4, parameters=PARAMETERS)
        )
        campaign = covey.start_rounds(state, BUFFERED if buffered else REQUEST)
        service = ServiceProcess(state, broker.url)
        service.program = (str(Path(__file__).with_name("faults_service.py")), trap.to_json())
        stack.enter_context(service)
        fleet.wait(mark.exists, seconds=SECONDS)
        time.sleep(0.5)
        if victim == "broker":
            broker.restart()
        elif victim == "postgresql" and server is not None:
            server.start()
        else:
            code = service.end(signal.SIGKILL)
            assert code == -signal.SIGKILL, f"the service ended by itself: {code}\n{service.log}"
            service.program = COMMAND
            service.start()
        ended = True
        try:
            fleet.wait(lambda: _finished(state, campaign.campaign_id), seconds=SECONDS)
        except AssertionError:
            ended = False
        code = service.end(signal.SIGTERM)
        with covey.open_operator(state) as operator:
            lost = count_losses(operator, fleet.devices.values()) if ended else None
            views = operator.rounds(campaign.campaign_id)
        outcome = "stuck"
        if lost is not None and code == 0 and views[-1].record.status == "completed":
            first = views[0].record
            outcome = first.status if first.status == "completed" else f"aborted ({first.code})"
        elif os.environ.get("COVEY_FAULTS_LOG"):
            print(service.log, file=sys.stderr)
        return Outcome(
            f"{'buffer: ' * buffered}{boundary}, {side}",
            victim,
            outcome,
            lost.uploads if lost else -1,
            lost.versions if lost else -1,
            lost.ledger_entries if lost else -1,
        )


@contextmanager
def _database(server: PostgresProcess | None) -> Iterator[None]:
    """What `init` uses: a new database of the server, or SQLite."""
    before = os.environ.pop(covey.DATABASE_VARIABLE, None)
    if server is not None:
        os.environ[covey.DATABASE_VARIABLE] = server.new_database()
    try:
        yield
    finally:
        os.environ.pop(covey.DATABASE_VARIABLE, None)
        if before is not None:
            os.environ[covey.DATABASE_VARIABLE] = before


def _finished(state: Path, campaign_id: str) -> bool:
    try:
        with covey.open_operator(state) as operator:
            return operator.campaign(campaign_id).status not in ("waiting", "running")
    except RepositoryError:
        return False  # it is what was killed


def run_matrix(victims: Sequence[str], *, buffered: bool = False) -> Iterator[Outcome]:
    """Every boundary of a round, or of a buffer, both sides, each victim."""
    with ExitStack() as stack:
        server = None
        programs = find_postgresql()
        if "postgresql" in victims and programs is not None:
            server = stack.enter_context(postgresql(programs))
        for victim in victims:
            if victim == "postgresql" and server is None:
                continue
            for boundary in BUFFER_BOUNDARIES if buffered else BOUNDARIES:
                for side in SIDES:
                    yield run_case(boundary, side, victim, server, buffered=buffered)


def _outcomes(of: Sequence[str], victims: Sequence[str]) -> Iterator[Outcome]:
    if "rounds" in of:
        yield from run_matrix(victims)
    if "buffers" in of:
        yield from run_matrix(victims, buffered=True)
    if "rollouts" in of and "aggregator" in victims:
        for boundary in ROLLOUT_BOUNDARIES:
            for side in SIDES:
                yield run_rollout_case(boundary, side)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix, prints the table and writes the JSON file; 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the matrix as JSON to this file")
    parser.add_argument("--victim", action="append", choices=VICTIMS, help="only this one (all)")
    parser.add_argument("--of", action="append", choices=KINDS, help="only boundaries of these (all)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    outcomes = []
    for outcome in _outcomes(options.of or KINDS, options.victim or VICTIMS):
        outcomes.append(outcome)
        print(f"{outcome.victim}: {outcome.phase}: {outcome.outcome}", file=sys.stderr, flush=True)
    table = Table("phase", "victim", "outcome", "uploads", "versions", "ledger entries", title="lost")
    for row in outcomes:
        figures = (row.lost_uploads, row.lost_versions, row.lost_ledger_entries)
        table.add_row(row.phase, row.victim, row.outcome, *map(str, figures))
    console.print(table)
    clean = sum(outcome.lossless for outcome in outcomes)
    console.print(f"{clean} of {len(outcomes)} kills without a loss")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return 0 if clean == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
