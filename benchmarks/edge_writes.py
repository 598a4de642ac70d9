"""How much a device writes to its card: at rest, for a version, and for a round. Real process, real broker.

    python benchmarks/edge_writes.py [--json FILE] [--rounds N] [--idle SECONDS] [--reconnects N]

Counted is what the kernel had to write for the device's process (`write_bytes` of /proc/PID/io: whole pages,
once for each time that they were changed and flushed), in the watch model's rounds. A day at rest is taken to
be as many times what was measured, with the reconnections of a bad link. What the client logs is counted by
itself: the journal writes it. The state has to be on a disk; a file system in memory writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from deploy.broker import BrokerProcess
from tests.edge_broker import Device, Fleet, Hub, running, wait_for
from tests.integration.test_edge_rounds import POLICY, WATCH, WEIGHTS, Collecting, Round

DAY = 86_400
_PROBE = 1 << 16


@dataclass(frozen=True)
class Written:
    """Bytes that one device wrote, and logged.

    Attributes:
        day: at rest for 24 hours, reconnections included.
        version: taking a version: its files, their trial, and the record.
        round: a whole round, masked input included.
    """

    idle_seconds: int
    idle: int
    idle_log: int
    reconnects: int
    reconnect: float
    reconnect_log: float
    version: int
    rounds: int
    round: float
    round_log: float
    model_bytes: int
    upload_bytes: int

    def day(self, rounds: int, reconnects: int = 24) -> float:
        """Bytes of a day with so many rounds and one new version a round."""
        at_rest = self.idle * DAY / self.idle_seconds
        return at_rest + rounds * (self.round + self.version) + reconnects * self.reconnect


class Meter:
    """What one device has written so far, over all of its processes."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def read(self) -> tuple[int, int]:
        """Bytes to the disk, and bytes of log."""
        assert self._device._process is not None
        lines = Path(f"/proc/{self._device._process.pid}/io").read_text().splitlines()
        counted = dict(line.split(": ") for line in lines)
        return int(counted["write_bytes"]), self._device.log.stat().st_size


def measure(rounds: int, idle: int, reconnects: int) -> Written:
    """Measures one device of four."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="covey-writes-")))
        broker = stack.enter_context(BrokerProcess("mosquitto"))
        fleet = Fleet(folder)
        names = [f"device-{i}" for i in range(4)]
        devices = [
            Device(fleet.enrolled(name, POLICY), fleet.data(name, WATCH.manifest), broker) for name in names
        ]
        hub = stack.enter_context(Hub(broker))
        stack.enter_context(running(*devices))
        meter = Meter(devices[0])
        wait_for(lambda: all(hub.online(name) for name in names), 60, "the devices")

        before = meter.read()
        hub.publish(WATCH.manifest, WATCH.graph, WEIGHTS, fleet.operator)
        wait_for(lambda: all(hub.serving(name) == {"watch": 1} for name in names), 60, "the version")
        version = meter.read()[0] - before[0]

        before, upload = meter.read(), 0
        for _ in range(rounds):
            done = Round(hub, fleet, names)
            for phase in (object, object, Collecting, object, object):
                done.phase(phase)
            done.mean()
            upload = next(iter(done.stored.values())).size
            done.end()
            time.sleep(1.5)
        after = meter.read()
        in_rounds, log = (after[0] - before[0]) / rounds, (after[1] - before[1]) / rounds

        before = meter.read()
        time.sleep(idle)
        after = meter.read()
        at_rest, idle_log = after[0] - before[0], after[1] - before[1]

        before = meter.read()
        for _ in range(reconnects):
            hub.expel(names[0])
            wait_for(lambda: not hub.online(names[0]), 30, "the last will")
            wait_for(lambda: hub.online(names[0]), 60, "the return")
        after = meter.read()
    return Written(
        idle_seconds=idle,
        idle=at_rest,
        idle_log=idle_log,
        reconnects=reconnects,
        reconnect=(after[0] - before[0]) / reconnects,
        reconnect_log=(after[1] - before[1]) / reconnects,
        version=version,
        rounds=rounds,
        round=in_rounds,
        round_log=log,
        model_bytes=len(WATCH.graph) + len(WEIGHTS),
        upload_bytes=upload,
    )


def on_disk() -> bool:
    """Whether writes to the temporary directory are counted at all."""

    def count() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["write_bytes"])

    before = count()
    with tempfile.TemporaryFile() as file:
        file.write(bytes(_PROBE))
        file.flush()
    return count() - before >= _PROBE


def show(written: Written) -> None:
    """Prints the table."""
    table = Table("one device, watch model", "to the card", "of log")
    table.add_row(f"at rest, {written.idle_seconds} s", _size(written.idle), _size(written.idle_log))
    table.add_row("a reconnection", _size(written.reconnect), _size(written.reconnect_log))
    table.add_row(f"a version (files of {_size(written.model_bytes)})", _size(written.version), "")
    table.add_row(
        f"a round (masked input of {_size(written.upload_bytes)})",
        _size(written.round),
        _size(written.round_log),
    )
    for rounds in (0, 24, 288):
        table.add_row(
            f"a day: {rounds} rounds and versions, 24 reconnections", _size(written.day(rounds)), ""
        )
    Console().print(table)


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=int, default=60, metavar="SECONDS")
    parser.add_argument("--reconnects", type=int, default=3)
    options = parser.parse_args()
    if not on_disk():
        sys.stderr.write("the temporary directory is in memory: set TMPDIR to one on a disk\n")
        return 1
    written = measure(options.rounds, options.idle, options.reconnects)
    show(written)
    if options.json is not None:
        days = {f"day_{rounds}_rounds": written.day(rounds) for rounds in (0, 24, 288)}
        options.json.write_text(json.dumps(asdict(written) | days, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
