"""Ten minutes of a bad network: twenty devices, and everything that goes wrong at once.

    python benchmarks/chaos.py [--seconds 600] [--devices 20] [--seed 7] [--json FILE]

Real `covey-edge run` processes train the watch model over TLS behind links with 300 ms latency, 5 % loss and
a rate limit. Groups of them are partitioned for 30 s at a time, connections are reset, the broker restarts,
and devices are killed by SIGKILL, as is the aggregator in the first half. Then the network heals, and one
last round asks for every device: whoever is stuck is missed there.

Exit code 0 says: every round completed or aborted for a stated reason; what a device holds a receipt for is
in the sum of every completed round; whose input is in a sum has it in its ledger; versions and transcripts
have no gap; nobody is missing in the last round; memory stays flat. Without root (or `ip`, `tc`, `nft`) there
is neither loss nor a rate limit, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.progress import Progress

from aggregator import main as covey
from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest
from deploy.broker import free_port
from deploy.demo.processes import ChildProcess
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from models.datasets import watch
from protocol import transcript
from protocol.dp.parameters import PrivacyMode
from protocol.plan import Deadlines
from tests.faulty_network import HOST_ADDRESS, Group, bad_links, can_make_namespaces
from tests.fleet_broker import FleetBroker

GROUPS = 4
LATENCY, LOSS, RATE = 0.3, 0.05, "2mbit"
PARTITION_SECONDS = 30.0
HEALING_SECONDS = 180.0
SETTLING_SECONDS = 240.0
FLAT = 1.15
"""How much larger a process may be at the end than when it had settled."""
POLICY = DevicePolicy(minimum_cohort=3, minimum_survivors=3, maximum_epsilon=None)
DEADLINES = Deadlines(
    advertise_keys=30, share_keys=30, masked_input=60, consistency_check=30, unmasking=30, offline_grace=10
)
Kind = Literal[
    "partition", "heal", "reset", "restart broker", "kill device", "start device", "kill aggregator"
]


@dataclass(frozen=True, order=True)
class Fault:
    """Something that happens to a group or a device, so many seconds after the begin."""

    at: float
    kind: Kind
    index: int = 0


def schedule(seconds: float, devices: int, chance: np.random.Generator) -> list[Fault]:
    """Draws what goes wrong; the last fault is over when the time is."""
    faults: list[Fault] = []

    def every(low: float, high: float, until: float) -> Iterator[float]:
        at = chance.uniform(low, high) / 2
        while at < until:
            yield at
            at += chance.uniform(low, high)

    length = min(PARTITION_SECONDS, seconds / 4)
    for at in every(45, 75, seconds - length):
        group = int(chance.integers(GROUPS))
        faults += [Fault(at, "partition", group), Fault(at + length, "heal", group)]
    for at in every(12, 24, seconds - 10):
        device = int(chance.integers(devices))
        faults += [Fault(at, "kill device", device), Fault(at + chance.uniform(1, 8), "start device", device)]
    faults += [Fault(at, "reset", int(chance.integers(GROUPS))) for at in every(30, 60, seconds)]
    faults += [Fault(at, "restart broker") for at in every(90, 150, seconds)]
    # In the second half the aggregator lives on, so that its memory says something.
    faults += [Fault(at, "kill aggregator") for at in every(60, 120, seconds / 2)]
    return sorted(faults)


@dataclass
class Memory:
    """Resident bytes of one life of a process, and when they were read."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def growth(self) -> float | None:
        """The last third over the one before, when it lived for four minutes.

        Before that it has not settled: a device takes its interpreter in with its first round.
        """
        if not self.samples or self.samples[-1][0] - self.samples[0][0] < SETTLING_SECONDS:
            return None
        third = len(self.samples) // 3
        sizes = [size for _, size in self.samples]
        return median(sizes[-third:]) / median(sizes[third : 2 * third])


@dataclass
class Chaos:
    """What runs: broker, aggregator, devices by number, and their links."""

    state: Path
    broker: FleetBroker
    aggregator: ChildProcess
    devices: list[ChildProcess]
    groups: Sequence[Group]
    lives: dict[tuple[str, int], Memory] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)

    def strike(self, fault: Fault) -> None:
        """Lets one thing go wrong, or end."""
        self.done[fault.kind] += 1
        if fault.kind in ("partition", "heal"):
            self.groups[fault.index].proxy.partitioned = fault.kind == "partition"
        elif fault.kind == "reset":
            self.groups[fault.index].proxy.cut()
        elif fault.kind == "restart broker":
            self.broker.stop()
            self.broker.start()
        elif fault.kind == "kill aggregator":
            self.aggregator.kill()
            self.aggregator.start()
        elif fault.kind == "kill device":
            self.devices[fault.index].kill()
        elif not self.devices[fault.index].running:
            self.devices[fault.index].start()

    def heal(self) -> None:
        """Ends everything that is wrong."""
        for group in self.groups:
            group.proxy.partitioned, group.proxy.delay = False, 0.0
        for process in (self.aggregator, *self.devices):
            if not process.running:
                process.start()

    def explain(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Says, as the context of a run ends with an error, what everybody logged last."""
        if error is not None:
            for process in (self.aggregator, *self.devices):
                error.add_note(f"--- {process.name} ({process.exit_code})\n{process.log_tail()[-1500:]}")

    def sample(self, now: float) -> None:
        """Reads how large every process is; one that ended by itself is a defect."""
        for process in (self.aggregator, *self.devices):
            if process.running:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                life = self.lives.setdefault((process.name, process.pid), Memory())
                life.samples.append((now, pages * os.sysconf("SC_PAGE_SIZE")))
            elif process.exit_code not in (None, -9):
                raise AssertionError(f"{process.name} ended by itself:\n{process.log_tail()}")


def request(devices: int, *, everybody: bool) -> CampaignRequest:
    """Rounds of half of the fleet for as long as it takes, or one round of all."""
    cohort = devices if everybody else max(3, devices // 2)
    least = devices if everybody else max(3, cohort // 2)
    return CampaignRequest(
        "watch",
        rounds=1 if everybody else 1_000,
        cohort=cohort,
        minimum=least,
        min_survivors=least,
        rest_rounds=0,
        local_epochs=1,
        privacy=PrivacyMode.DISTRIBUTED,
        noise_multiplier=0.01,
        gather_seconds=60.0 if everybody else 15.0,
        deadlines=DEADLINES,
    )


def run(seconds: float, devices: int, seed: int, tell: Callable[[float], None]) -> dict[str, object]:
    """Runs everything; returns what happened and what is wrong with it."""
    apart = can_make_namespaces()
    host = HOST_ADDRESS if apart else "localhost"
    with tempfile.TemporaryDirectory(prefix="covey-chaos-") as directory, ExitStack() as stack:
        folder = Path(directory)
        folder.chmod(0o755)  # the broker's user passes through
        state, port = folder / "agg", free_port()
        covey.init(state, fleet="chaos", broker=f"mqtts://localhost:{port}", broker_names=(host,))
        covey.publish(state, Path(zoo.__file__).parent / "watch")
        broker = stack.enter_context(FleetBroker(state, port))
        links = bad_links(port, GROUPS, host=host, latency=LATENCY, loss=LOSS, rate=RATE)
        groups = stack.enter_context(links)
        program = ("-c", "from aggregator.cli import main; main()", "aggregator", "run")
        address = ("--state", state, "--broker", broker.url, "--listen", "127.0.0.1:0")
        aggregator = ChildProcess(
            "aggregator", [sys.executable, *program, *map(str, address)], log=folder / "aggregator.log"
        )
        chaos = Chaos(state, broker, aggregator, _devices(folder, state, devices, groups), groups)
        for process in (aggregator, *chaos.devices):
            stack.callback(process.stop)
            process.start()
        _wait(lambda: covey.is_running(state), 60, "the service")
        campaign = covey.start_rounds(state, request(devices, everybody=False)).campaign_id
        _storm(chaos, schedule(seconds, devices, np.random.default_rng(seed)), seconds, tell)
        chaos.heal()
        stack.push(chaos.explain)
        with covey.open_operator(state) as operator:
            operator.pause_campaign(campaign)
        _wait(lambda: not _running(state), HEALING_SECONDS, "the last round of the storm ends")
        _wait(lambda: _online(state) == devices, HEALING_SECONDS, "everybody is online again")
        last = covey.start_rounds(state, request(devices, everybody=True)).campaign_id
        _wait(lambda: _finished(state, last), HEALING_SECONDS, "the round of everybody ends")
        for process in chaos.devices:
            process.stop()
        aggregator.stop()
        return _judge(chaos, folder, last) | {
            "seconds": seconds,
            "devices": devices,
            "seed": seed,
            "latency_s": LATENCY,
            "loss": LOSS if apart else 0.0,
            "rate": RATE if apart else None,
            "faults": dict(chaos.done),
        }


def _devices(folder: Path, state: Path, count: int, groups: Sequence[Group]) -> list[ChildProcess]:
    """Enrolled devices with the recordings of one person each; they join the links in turn."""
    people = watch.load()
    made = []
    for number in range(count):
        name = f"watch-{number:02}"
        own, data = folder / name, folder / f"{name}-data"
        enrol(own, covey.enrol(state, initialise(own, name)))
        set_policy(own, POLICY)
        data.mkdir()
        people[number % len(people)].save(data / "recordings.npz")
        group = groups[number % len(groups)]
        client = (sys.executable, "-m", "edge_client.main", "run", "--state", own, "--broker", group.url)
        client += ("--priority", "normal")
        made.append(
            ChildProcess(
                name,
                [*group.prefix, *client, "--data", data, "--model", "watch"],
                log=folder / f"{name}.log",
                directory=Path(__file__).parents[1],
                environment={"PYTHONNODEBUGRANGES": "1"},
            )
        )
    return made


def _storm(chaos: Chaos, faults: Sequence[Fault], seconds: float, tell: Callable[[float], None]) -> None:
    begin, left, sampled = time.monotonic(), list(faults), -5.0
    while (now := time.monotonic() - begin) < seconds or left:
        while left and left[0].at <= now:
            chaos.strike(left.pop(0))
        if now - sampled >= 5:
            chaos.sample(now)
            sampled = now
        tell(now)
        time.sleep(0.1)


def _wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)


def _running(state: Path) -> bool:
    with covey.open_operator(state) as operator:
        return any(view.record.status == "running" for view in operator.rounds())


def _online(state: Path) -> int:
    return sum(device.online for device in covey.devices(state))


def _finished(state: Path, campaign_id: str) -> bool:
    with covey.open_operator(state) as operator:
        return operator.campaign(campaign_id).status not in ("waiting", "running")


# --- judgement -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceRound:
    """What a device kept of a round."""

    receipted: bool
    in_ledger: bool


def _judge(chaos: Chaos, folder: Path, last: str) -> dict[str, object]:
    with covey.open_operator(chaos.state) as operator:
        views = operator.rounds()
        versions = [version.version for version in operator.versions("watch")]
        with operator.repository.read() as reader:
            records = [reader.transcript(view.record.round_id) for view in views]
            spent = {entry.round_id for entry in reader.ledger()}
    completed = [view for view in views if view.record.status == "completed"]
    kept = {process.name: _device_rounds(folder / process.name) for process in chaos.devices}
    growth = {name: found for (name, _), life in chaos.lives.items() if (found := life.growth()) is not None}
    worst = max(growth, key=lambda name: growth[name], default="nobody")
    problems = [*_lost(completed, kept)]
    problems += [f"round {v.record.round_id[:8]} aborted without a reason" for v in views if _unexplained(v)]
    problems += [
        f"round {v.record.round_id[:8]} is not in the ledger"
        for v in completed
        if v.record.round_id not in spent
    ]
    if versions != list(range(1, len(completed) + 2)):
        problems.append(f"{len(completed)} completed rounds made the versions {versions}")
    head = transcript.GENESIS
    for chained in records:
        transcript.verify(chained, head)
        head = transcript.digest(chained[-1])
    final = next(view for view in views if view.record.campaign_id == last)
    if final.record.status != "completed":
        problems.append(f"the round of everybody: {final.record.code} {final.record.detail}")
    if growth and growth[worst] > FLAT:
        problems.append(f"{worst} grew to {growth[worst]:.2f} times what it was")
    storm = [view.record for view in views if view.record.campaign_id != last]
    return {
        "rounds": len(storm),
        "completed": sum(record.status == "completed" for record in storm),
        "aborted": dict(Counter(record.code for record in storm if record.status == "aborted")),
        "updates": sum(len(view.report.survivors) for view in completed),
        "last_round_devices": len(final.report.survivors),
        "growth_max": growth.get(worst),
        "growth_aggregator": growth.get("aggregator"),
        "lives_measured": len(growth),
        "problems": problems,
    }


def _lost(completed: Sequence[RoundView], kept: dict[str, dict[str, DeviceRound]]) -> Iterator[str]:
    for view in completed:
        round_id, survivors = view.record.round_id, set(view.report.survivors)
        for name, rounds in kept.items():
            own = rounds.get(round_id, DeviceRound(receipted=False, in_ledger=False))
            if own.receipted and name not in survivors:
                yield f"{name} holds a receipt for round {round_id[:8]}, whose sum is without it"
            if name in survivors and not own.in_ledger:
                yield f"{name} is in the sum of round {round_id[:8]} and has not entered it"


def _unexplained(view: RoundView) -> bool:
    return view.record.status == "aborted" and not (view.record.code and view.record.detail)


def _device_rounds(state: Path) -> dict[str, DeviceRound]:
    with closing(sqlite3.connect(f"file:{state / 'device.sqlite'}?mode=ro", uri=True)) as database:
        entered = {round_id for (round_id,) in database.execute("SELECT round_id FROM ledger")}
        rounds = dict(database.execute("SELECT round_id, uploaded FROM rounds").fetchall())
    names = entered | rounds.keys()
    return {name: DeviceRound(bool(rounds.get(name)), name in entered) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it, prints the result and writes the JSON file; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of faults (%(default)s)")
    parser.add_argument("--devices", type=int, default=20, help="client processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="draws the faults (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result as JSON to this file")
    options = parser.parse_args(arguments)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("faults", total=options.seconds)
        result = run(
            options.seconds, options.devices, options.seed, lambda now: bar.update(task, completed=now)
        )
    console = Console()
    for name, value in result.items():
        console.print(f"{name:20} {value}", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
