"""What a fleet that checks in costs: thousands of connections, a real broker, a real service.

    python benchmarks/load.py [--json FILE] [--devices 2000] [--rate 500] [--seconds 20]

Every device has a TLS connection of its own, with its own certificate, to mosquitto with the configuration
that `covey aggregator init` wrote, and says at random moments that it is there, as it does after every
reconnect. A check-in is done when the aggregator has committed it and acknowledged it to the
broker; its latency is from the device's send to that. Devices, broker and service share the machine's cores.
The idle figure is of a service that has started and has a broker, before any device is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import secrets
import signal
import ssl
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console
from rich.table import Table

from aggregator import main as covey
from deploy.broker import free_port
from protocol import topics
from protocol.codec import encode
from protocol.identity import create_request
from protocol.messages import DeviceStatus
from tests.aggregator_process import ServiceProcess
from tests.fleet_broker import FleetBroker

IDLE_SECONDS = 5.0
END_VERSION, END_SECONDS = 4, 60.0
CONNECTING = 50
"""Handshakes under way at once."""


@dataclass(frozen=True)
class Result:
    """Figures of one run; latencies in milliseconds, CPU in cores (seconds of CPU a second).

    Attributes:
        lost: check-ins that were sent and never accounted for.
        late_ms: 99th percentile of how late the generator itself was: high values spoil the rest.
    """

    devices: int
    rate: float
    seconds: float
    sent: int
    lost: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    late_ms: float
    idle_mb: float
    loaded_mb: float
    service_cores: float
    broker_cores: float
    generator_cores: float


class Device(asyncio.Protocol):
    """One MQTT 3.1.1 connection that publishes at QoS 1 and hears nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self._mid = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        name = self.name.encode()
        body = b"\x00\x04MQTT\x04\x02" + struct.pack(">HH", 600, len(name)) + name
        transport.write(b"\x10" + _length(len(body)) + body)

    def data_received(self, data: bytes) -> None:
        if not self.connected.done():
            if data[:4] == b"\x20\x02\x00\x00":
                self.connected.set_result(None)
            else:
                self.connected.set_exception(ConnectionError(f"the broker refused: {data[:4].hex()}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if not self.connected.done():
            self.connected.set_exception(error or ConnectionError("the broker hung up"))

    def check_in(self, version: int = 3) -> str:
        """Says that it is there, and what it serves; returns the session, in hexadecimal."""
        session = secrets.token_bytes(32)
        payload = encode(
            DeviceStatus(session=session, online=True, client_version="load", models={"watch": version})
        )
        topic = topics.up(self.name, "status").encode()
        self._mid = self._mid % 65_535 + 1
        body = struct.pack(">H", len(topic)) + topic + struct.pack(">H", self._mid) + payload
        assert self.transport is not None
        self.transport.write(b"\x33" + _length(len(body)) + body)  # PUBLISH, QoS 1, retained
        return session.hex()


def _length(size: int) -> bytes:
    """A remaining length, MQTT 3.1.1 section 2.2.3."""
    out = bytearray()
    while True:
        size, digit = divmod(size, 128)
        out.append(digit | (128 if size else 0))
        if not size:
            return bytes(out)


async def generate(
    broker: FleetBroker,
    identities: Mapping[str, ssl.SSLContext],
    rate: float,
    seconds: float,
    usage: Callable[[], list[float]],
    served: Callable[[str], int],
) -> tuple[dict[str, float], list[float], list[float]]:
    """Connects every device, lets them check in, waits until the service has heard the last, and hangs up.

    Returns:
        When each session was sent, on the monotonic clock; how late each was; and cores used meanwhile.
    """
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(CONNECTING)

    async def connect(name: str) -> Device:
        async with gate:
            _, device = await loop.create_connection(
                lambda: Device(name), broker.host, broker.port, ssl=identities[name], ssl_handshake_timeout=60
            )
            await asyncio.wait_for(device.connected, 60)
            return device

    devices = await asyncio.gather(*map(connect, identities))
    generator = np.random.default_rng(1)
    # A Poisson process: devices do not take turns.
    moments = np.cumsum(generator.exponential(1 / rate, int(rate * seconds)))
    whose = generator.integers(0, len(devices), len(moments))
    sent: dict[str, float] = {}
    late: list[float] = []
    before = usage()
    begin = time.monotonic() + 0.5
    for moment, who in zip(moments + begin, whose, strict=True):
        if (rest := moment - time.monotonic()) > 0.001:
            await asyncio.sleep(rest)
        now = time.monotonic()
        late.append(max(0.0, now - moment))
        sent[devices[who].check_in()] = now
    cores = [(end - start) / (time.monotonic() - begin) for start, end in zip(before, usage(), strict=True)]
    await asyncio.sleep(1.0)  # the broker takes from many connections in any order
    # And then gives in order: when the service knows of this one, it has had those before.
    name, device = next(zip(identities, devices, strict=True))
    device.check_in(END_VERSION)
    patience = time.monotonic() + END_SECONDS
    while served(name) != END_VERSION and time.monotonic() < patience:
        await asyncio.sleep(0.1)
    gone = sum(device.lost for device in devices)
    if gone:
        raise ConnectionError(f"the broker hung up on {gone} devices")
    for device in devices:
        assert device.transport is not None
        device.transport.close()
    return sent, late, cores


def enrol(state: Path, count: int) -> dict[str, ssl.SSLContext]:
    """Enrols devices, and returns their TLS settings; one key serves them all, as nothing is secret here."""
    identity = Ed25519PrivateKey.generate()
    request = create_request(identity, "load")
    pem = identity.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    found = {}
    file = state / "device.pem"
    with covey.open_operator(state) as operator, operator.repository.write() as writer:
        for index in range(count):
            name = f"load-{index}"
            device = operator.authority.enrol(request, None, name=name, now=time.time(), serial=index + 1)
            writer.add_device(device)
            file.write_text(pem + ssl.DER_cert_to_PEM_cert(device.certificate))
            found[name] = ssl.create_default_context(cafile=str(state / "ca.pem"))
            found[name].load_cert_chain(file)
    file.unlink()
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Resident memory of a process, 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def run(devices: int, rate: float, seconds: float) -> Result:
    """One run, in a directory that is removed afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * devices + 500)), hard))
    with tempfile.TemporaryDirectory(prefix="covey-load-") as directory, ExitStack() as stack:
        state, moments, port = Path(directory) / "state", Path(directory) / "moments.json", free_port()
        covey.init(state, broker=f"mqtts://localhost:{port}")
        identities = enrol(state, devices)
        broker = stack.enter_context(FleetBroker(state, port))
        service = ServiceProcess(state, broker.url)
        service.program = (str(Path(__file__).with_name("load_service.py")), str(moments))
        with service:
            deadline = time.monotonic() + 60
            while "connected to the broker" not in service.log:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the service does not start: {service.log}")
                time.sleep(0.1)
            time.sleep(IDLE_SECONDS)
            idle = resident_mb(service.pid)

            def usage() -> list[float]:
                return [cpu_seconds(service.pid), cpu_seconds(broker.pid), time.process_time()]

            operator = stack.enter_context(covey.open_operator(state))

            def served(name: str) -> int:
                return operator.device(name).models.get("watch", 0)

            sent, late, cores = asyncio.run(generate(broker, identities, rate, seconds, usage, served))
            loaded = resident_mb(service.pid)
            service.end(signal.SIGTERM)
        done: dict[str, float] = json.loads(moments.read_text())
    waits = sorted(1000 * (done[session] - at) for session, at in sent.items() if session in done)
    if not waits:
        raise RuntimeError(f"no check-in was accounted for: {service.log[-2000:]}")
    centiles = statistics.quantiles(waits, n=100, method="inclusive")
    return Result(
        devices=devices,
        rate=rate,
        seconds=seconds,
        sent=len(sent),
        lost=len(sent) - len(waits),
        p50_ms=round(centiles[49], 1),
        p99_ms=round(centiles[98], 1),
        worst_ms=round(waits[-1], 1),
        late_ms=round(1000 * statistics.quantiles(late, n=100, method="inclusive")[98], 1),
        idle_mb=round(idle, 1),
        loaded_mb=round(loaded, 1),
        service_cores=round(cores[0], 2),
        broker_cores=round(cores[1], 2),
        generator_cores=round(cores[2], 2),
    )


def show(result: Result, console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"{result.devices} devices, {result.rate:g} check-ins a second")
    table.add_column("")
    table.add_column("", justify="right")
    for name, text in (
        ("check-ins sent, lost", f"{result.sent}, {result.lost}"),
        ("latency: median", f"{result.p50_ms} ms"),
        ("latency: 99th percentile", f"{result.p99_ms} ms"),
        ("latency: worst", f"{result.worst_ms} ms"),
        ("the generator itself was late: 99th percentile", f"{result.late_ms} ms"),
        ("memory of the service: idle, loaded", f"{result.idle_mb} MB, {result.loaded_mb} MB"),
        (
            "CPU: service, broker, devices",
            f"{result.service_cores}, {result.broker_cores}, {result.generator_cores} cores",
        ),
    ):
        table.add_row(name, text)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument(
        "--rate", type=float, default=500.0, help="check-ins a second, of all devices together"
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    result = run(options.devices, options.rate, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    show(result, Console())


if __name__ == "__main__":
    main()
