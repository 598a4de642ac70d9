"""A fleet as `covey aggregator init` makes it, with its broker, and clients that try things."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aggregator import main as covey
from aggregator.adapters.tls import TlsFiles
from aggregator.fleet import access
from deploy.broker import free_port
from edge_client.adapters.credentials import tls_files
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from tests.aggregator_process import COMMAND
from tests.fleet_broker import FleetBroker, Peer

POLICY = DevicePolicy(minimum_cohort=3, minimum_survivors=2, maximum_epsilon=None)


def run(*arguments: object) -> str:
    """`covey`, as a person types it."""
    done = subprocess.run(
        [sys.executable, *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Bench:
    state: Path
    broker: FleetBroker

    def device(self, name: str) -> Path:
        """The state directory of an enrolled device."""
        state = self.state.parent / name
        enrol(state, covey.enrol(self.state, initialise(state, name)))
        set_policy(state, POLICY)
        return state

    def admit(self) -> None:
        """Lets the broker know who is enrolled, as its next start would."""
        self.broker.stop()
        with covey.open_operator(self.state) as operator, operator.repository.read() as reader:
            content = access.document(access.wanted(reader.active_devices()))
        (self.state / "broker" / "access.json").write_bytes(content)
        self.broker.start()

    def knows(self, device_id: str) -> bool:
        """Whether the broker, as it runs, lets a device in."""
        try:
            content = json.loads((self.state / "broker" / "data" / "access.json").read_bytes())
        except ValueError:
            return False  # it is being written
        return any(client["username"] == device_id for client in content["clients"])

    def peer(self, identity: Path | None, client_id: str, will: tuple[str, bytes] | None = None) -> Peer:
        """A client with the certificate of a device, or without one."""
        if identity is not None:
            return Peer(self.broker, tls_files(identity).context(), client_id, will)
        context = ssl.create_default_context(cafile=str(self.state / "ca.pem"))
        return Peer(self.broker, context, client_id)

    def aggregator(self) -> Peer:
        keys = self.state / "keys"
        files = TlsFiles(self.state / "ca.pem", keys / "aggregator.pem", keys / "aggregator-key.pem")
        return Peer(self.broker, files.context(), "covey-aggregator-orchard")


@contextmanager
def fleet_bench(tmp_path: Path) -> Iterator[Bench]:
    state, port = tmp_path / "agg", free_port()
    made = run(
        "aggregator", "init", "--state", state, "--fleet", "orchard", "--broker", f"mqtts://localhost:{port}"
    )
    assert f"sh {state}/broker/start" in made
    assert f"covey aggregator run --state {state}" in made and "covey model publish DIR" in made
    with FleetBroker(state, port) as broker:
        yield Bench(state, broker)
