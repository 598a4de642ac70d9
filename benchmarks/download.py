"""How a device should fetch a model: chunks over MQTT, or HTTP ranges?

    python benchmarks/download.py [--json FILE] [--repeat 3]        (as root: it makes a network of its own)

The device is in a network namespace behind a virtual cable, which drops packets (nftables, both directions)
or is as slow as a Pi's wireless link (tc tbf). MQTT is the real service, mosquitto with the configuration of
`covey aggregator init`, and the device's own link; HTTP is uvicorn with client certificates and
Python's `http.client`. Both are TLS, store chunk by chunk and check the digest. "killed" is SIGKILL of the
device after half of it, and a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from aggregator import main as covey
from benchmarks.load import cpu_seconds, resident_mb
from deploy.broker import free_port
from edge_client.device_setup import enrol, initialise
from models.manifest import ModelManifest
from protocol.fields import BlobRef
from tests.aggregator_devices import model_files
from tests.aggregator_process import ServiceProcess
from tests.fleet_broker import FleetBroker

SPACE, HERE, THERE = "covey-dl", "covey-dl-a", "covey-dl-b"
HUB, EDGE = "10.77.0.1", "10.77.0.2"
SIZES = {"20 kB": 5_000, "14 MB": 3_500_000}
"""Float32 parameters of each."""
Transport = Literal["mqtt", "http"]
Condition = Literal["clean", "5 % loss", "20 Mbit/s", "20 Mbit/s, 5 % loss", "20 Mbit/s, killed"]
CONDITIONS: tuple[Condition, ...] = (
    "clean",
    "5 % loss",
    "20 Mbit/s",
    "20 Mbit/s, 5 % loss",
    "20 Mbit/s, killed",
)
GIVE_UP_SECONDS = 240.0


@dataclass(frozen=True)
class Case:
    """Medians of the runs of one case.

    Attributes:
        seconds: until the artefact is whole and checked, with connecting; of a killed device, those of the
            process after it, which resumed.
        megabytes_per_second: 10^6 bytes a second.
        device_memory_mb: peak of the process above what it held before connecting.
        server_cpu_seconds: of service and broker together, or of the web server.
        server_memory_mb: how much larger they were at the end.
        resent: bytes that came twice because of the kill.
    """

    transport: Transport
    artefact: str
    condition: Condition
    seconds: float
    megabytes_per_second: float
    device_cpu_seconds: float
    device_memory_mb: float
    server_cpu_seconds: float
    server_memory_mb: float
    resent: int


def _do(*command: str, space: bool = False) -> None:
    inside = ("ip", "netns", "exec", SPACE) if space else ()
    subprocess.run((*inside, *command), check=True, capture_output=True, text=True)


@contextmanager
def network() -> Iterator[None]:
    """A namespace for the device, at the end of a virtual cable."""
    _do("ip", "netns", "add", SPACE)
    try:
        _do("ip", "link", "add", HERE, "type", "veth", "peer", "name", THERE, "netns", SPACE)
        _do("ip", "addr", "add", f"{HUB}/24", "dev", HERE)
        _do("ip", "link", "set", HERE, "up")
        _do("ip", "addr", "add", f"{EDGE}/24", "dev", THERE, space=True)
        _do("ip", "link", "set", THERE, "up", space=True)
        _do("ip", "link", "set", "lo", "up", space=True)  # paho wakes its thread by it
        # One segment a packet, as on a real network: loss is of packets.
        _do("ip", "link", "set", HERE, "gso_max_segs", "1")
        _do("ip", "link", "set", THERE, "gso_max_segs", "1", space=True)
        yield
    finally:
        subprocess.run(["ip", "link", "del", HERE], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", SPACE], check=False, capture_output=True)


@contextmanager
def condition(name: Condition) -> Iterator[None]:
    """The cable in this condition."""
    with ExitStack() as stack:
        if "20 Mbit/s" in name:
            for device, space in ((HERE, False), (THERE, True)):
                _do(
                    *("tc", "qdisc", "add", "dev", device, "root", "tbf"),
                    *("rate", "20mbit", "burst", "32kb", "latency", "200ms"),
                    space=space,
                )
                stack.callback(_do, "tc", "qdisc", "del", "dev", device, "root", space=space)
        if "loss" in name:
            # In the device's namespace only: nothing else of this machine passes there.
            for hook in ("input", "output"):
                rule = f"add chain inet covey {hook} {{ type filter hook {hook} priority 0; }}"
                _do("nft", "add table inet covey", space=True)
                _do("nft", rule, space=True)
                _do("nft", f"add rule inet covey {hook} numgen random mod 100 < 5 drop", space=True)
            stack.callback(_do, "nft", "delete table inet covey", space=True)
        yield


@dataclass(frozen=True)
class Bench:
    """What is measured: where each transport is, and the processes that serve it."""

    state: Path
    urls: dict[Transport, str]
    pids: dict[Transport, tuple[int, ...]]

    def run(self, transport: Transport, name: str, blob: BlobRef, at: Condition) -> dict[str, float]:
        """One download, by a device of its own."""
        device = self.state.parent / name
        enrol(device, covey.enrol(self.state, initialise(device, name)))
        program = str(Path(__file__).with_name("download_device.py"))
        command = [
            *("ip", "netns", "exec", SPACE, sys.executable, program),
            *(str(device), self.urls[transport], blob.sha256, str(blob.size)),
        ]
        pids = self.pids[transport]
        before, memory = sum(map(cpu_seconds, pids)), sum(map(resident_mb, pids))
        kept = 0
        with condition(at):
            if "killed" in at:
                kept = self._killed(command, blob)
            answer = subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=GIVE_UP_SECONDS
            )
        figures: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
        figures["server_cpu"] = sum(map(cpu_seconds, pids)) - before
        figures["server_memory"] = sum(map(resident_mb, pids)) - memory
        figures["resent"] = figures["fetched"] + kept - blob.size if "killed" in at else 0
        shutil.rmtree(device)
        return figures

    def _killed(self, command: Sequence[str], blob: BlobRef) -> int:
        """Runs until half of it is there; returns the bytes that came."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        chunks = 0
        for line in process.stdout:
            chunks += line.startswith("chunk")
            if 2 * chunks * 65_536 >= blob.size:
                break
        process.send_signal(signal.SIGKILL)
        chunks += sum(line.startswith("chunk") for line in process.stdout)
        process.wait()
        return chunks * 65_536


@contextmanager
def bench(path: Path) -> Iterator[tuple[Bench, dict[str, BlobRef]]]:
    """Both servers, with the artefacts published."""
    state, port, web = path / "state", free_port(), free_port()
    covey.init(state, broker=f"mqtts://{HUB}:{port}")
    blobs = {}
    with covey.open_operator(state) as operator:
        for index, (name, parameters) in enumerate(SIZES.items()):
            files = model_files(parameters, name=f"model-{index}")
            operator.publish(*files)
            blobs[name] = ModelManifest.from_bytes(files[0]).weights
    own = state / "broker"
    files_of_server = [str(own / name) for name in ("ca.pem", "server.pem", "server-key.pem")]
    with ExitStack() as stack:
        broker = stack.enter_context(FleetBroker(state, port))
        service = stack.enter_context(ServiceProcess(state, broker.url))
        server = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).with_name("download_http.py"))),
                *(str(state / "registry" / "blobs"), str(web), *files_of_server),
            ]
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        deadline = time.monotonic() + 60
        while "connected to the broker" not in service.log:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service does not start: {service.log}")
            time.sleep(0.1)
        time.sleep(2.0)
        yield (
            Bench(
                state,
                {"mqtt": f"mqtts://{HUB}:{port}", "http": f"https://{HUB}:{web}"},
                {"mqtt": (service.pid, broker.pid), "http": (server.pid,)},
            ),
            blobs,
        )


def measure(repeat: int, console: Console) -> list[Case]:
    """Every case; the transports take turns, so that what else the machine does meets both."""
    cases: list[Case] = []
    with (
        tempfile.TemporaryDirectory(prefix="covey-download-") as directory,
        network(),
        bench(Path(directory)) as (place, blobs),
    ):
        for (artefact, blob), at in itertools.product(blobs.items(), CONDITIONS):
            if "killed" in at and artefact == "20 kB":
                continue  # one chunk
            runs: dict[Transport, list[dict[str, float]]] = {"mqtt": [], "http": []}
            for number in range(repeat):
                for transport, found in runs.items():
                    name = f"d{len(cases)}-{number}-{transport}"
                    found.append(place.run(transport, name, blob, at))
            for transport, found in runs.items():
                cases.append(_case(transport, artefact, at, blob, found))
                console.print(f"{artefact}, {at}, {transport}: {cases[-1].seconds} s")
    return cases


def _case(
    transport: Transport, artefact: str, at: Condition, blob: BlobRef, runs: Sequence[dict[str, float]]
) -> Case:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return Case(
        transport,
        artefact,
        at,
        seconds=round(middle["seconds"], 3),
        megabytes_per_second=round(middle["fetched"] / 1e6 / middle["seconds"], 3),
        device_cpu_seconds=round(middle["cpu_seconds"], 3),
        device_memory_mb=round(middle["memory_mb"], 1),
        server_cpu_seconds=round(middle["server_cpu"], 2),
        server_memory_mb=round(max(0.0, middle["server_memory"]), 1),
        resent=int(middle["resent"]),
    )


def show(cases: Sequence[Case], console: Console) -> None:
    """Prints the table."""
    table = Table(title="a download by one device")
    for heading in (
        *("artefact", "network", "by", "s", "MB/s", "device CPU s", "device MB"),
        *("server CPU s", "server MB", "resent kB"),
    ):
        table.add_column(heading, justify="left" if heading in ("artefact", "network", "by") else "right")
    for case in cases:
        table.add_row(
            *(case.artefact, case.condition, case.transport, f"{case.seconds:.2f}"),
            *(f"{case.megabytes_per_second:.2f}", f"{case.device_cpu_seconds:.2f}"),
            *(f"{case.device_memory_mb:.1f}", f"{case.server_cpu_seconds:.2f}"),
            *(f"{case.server_memory_mb:.1f}", f"{case.resent / 1e3:.0f}"),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nft", "tc"))):
        parser.error("it needs root, iproute2 and nftables")
    console = Console()
    cases = measure(options.repeat, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(case) for case in cases], indent=2) + "\n")
    show(cases, console)


if __name__ == "__main__":
    main()
