"""New clients on their way to real device processes: published, rolled out in waves, crashed, taken back.

Every device is a process that runs from a folder of installed versions; root's program is the real one, with
a service manager of the test's own in place of systemd.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aggregator import main as covey
from aggregator.operations import Operator
from aggregator.rollout_operations import RolloutRequest, RolloutView
from deploy.broker import BrokerProcess
from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.versions import Versions
from edge_client.device_setup import enrol, initialise
from edge_client.updater import Trust, run
from protocol.client_release import CLIENT, version_number
from tests.aggregator_process import ServiceProcess
from tests.client_bundles import OWN_TARGET, own_bundle
from tests.edge_broker import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NAMES = ("barn-1", "barn-2", "barn-3")
LONG = 120.0


@dataclass
class Installed:
    """A device: its installed clients, its state, and the process that runs."""

    folder: Path
    state: Path
    broker: BrokerProcess
    process: subprocess.Popen[bytes] | None = None
    started: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.state.with_suffix(".log")

    @property
    def current(self) -> str:
        return (self.folder / "current").readlink().name

    def installed(self, content: bytes) -> None:
        """Puts the first client in its place, as setup.sh does."""
        first = self.state.with_suffix(".tar.xz")
        first.write_bytes(content)
        store = Versions(self.folder)
        store.install("0.1.0", first)
        for link in ("current", "good"):
            store.point(link, "0.1.0")  # type: ignore[arg-type]

    # --- the service, as root's program sees it

    def self_test(self, version: Path) -> str | None:
        for arguments in (["--help"], ["status", "--state", str(self.state), "--json"]):
            command = [str(version / "bin" / "covey-edge"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False, cwd="/")
            if done.returncode != 0:
                return done.stderr
        return None

    def start(self, version: Path) -> None:
        self.stop()
        self.started.append(version.name)
        data = self.state.with_name(f"{self.state.name}-data")
        data.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(str(self.folder / "current" / "bin" / "covey-edge"), "run", "--state", str(self.state)),
                    *("--data", str(data), "--broker", self.broker.url),
                ],
                stderr=log,
                # Else the packages of the working directory would run.
                cwd="/",
                env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"},
            )

    def healthy(self) -> bool:
        """It stays up when it has come to its broker, and not when it ends before."""
        assert self.process is not None
        known = self.log.read_text().count(" connected ")
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            if self.log.read_text().count(" connected ") > known:
                return True
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=LONG)
            self.process = None

    def settle(self) -> None:
        """What systemd does: starts root's program when an update lies ready."""
        if not (self.state / "updates" / "ready").exists():
            return
        bundle = load_credentials(self.state).bundle
        trust = Trust(bundle.model_keys(), bundle.fleet, bundle.device_id, OWN_TARGET)
        run(self.folder, self.state / "updates", trust, self)


@dataclass
class World:
    """A service process, devices, and the operator's view of them."""

    operator: Operator
    devices: dict[str, Installed]

    def start(self, version: str, *percent: float) -> str:
        request = RolloutRequest(CLIENT, version_number(version), percent, ("errors<0.5",))
        return self.operator.start_rollout(request).record.rollout_id

    def wait(self, rollout_id: str, status: str) -> RolloutView:
        """Waits for a rollout to come to a status, with root's program at work on every device."""

        def there() -> bool:
            for device in self.devices.values():
                device.settle()
            return self.operator.rollout(rollout_id).record.status == status

        wait_for(there, 3 * LONG, f"the rollout is {status}")
        return self.operator.rollout(rollout_id)

    def all_run(self, version: str) -> None:
        """Waits until every device runs a version that stood its trial, and has said so."""

        def there() -> bool:
            for device in self.devices.values():
                device.settle()
            return self.running() == [version] * 3 and self.good() == [version_number(version)] * 3

        wait_for(there, 3 * LONG, f"all run {version}")

    def good(self) -> list[int | None]:
        return [device.models.get(CLIENT) for device in self.operator.devices()]

    def running(self) -> list[str]:
        return [device.current for device in self.devices.values()]


@pytest.fixture
def world(mosquitto: BrokerProcess, tmp_path: Path) -> Iterator[World]:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    first = own_bundle("0.1.0")
    with ExitStack() as stack:
        operator = stack.enter_context(covey.open_operator(state))
        devices = {}
        for name in NAMES:
            own = tmp_path / name
            enrol(own, operator.enrol(initialise(own, name)))
            devices[name] = Installed(tmp_path / "opt" / name, own, mosquitto)
            devices[name].installed(first)
        stack.enter_context(ServiceProcess(state, mosquitto.url))
        for device in devices.values():
            stack.callback(device.stop)
            device.start(device.folder / "versions" / "0.1.0")
        found = World(operator, devices)
        wait_for(lambda: found.good() == [1000] * 3, LONG, "the devices")
        operator.publish_client([first])
        found.wait(found.start("0.1.0", 100.0), "completed")
        yield found


def test_a_client_reaches_the_fleet_in_waves_and_a_crashing_one_goes_back(world: World) -> None:
    operator = world.operator
    operator.publish_client([own_bundle("0.2.0")])
    view = world.wait(world.start("0.2.0", 30.0, 100.0), "completed")
    assert [step.wave for step in view.progress.steps] == [0, 1, 1]
    # One that is just starting its new client is away, and holds no wave up: that is what soaking is for.
    world.all_run("0.2.0")
    assert {device.client_version for device in operator.devices()} == {"0.2.0"}
    assert {device.target for device in operator.devices()} == {OWN_TARGET}

    operator.publish_client([own_bundle("0.3.0", sick=True)])
    view = world.wait(world.start("0.3.0", 30.0, 100.0), "rolled-back")
    assert world.running() == ["0.2.0"] * 3
    (tried,) = [name for name, device in world.devices.items() if "0.3.0" in device.started]
    assert "this client crashes" in world.devices[tried].log.read_text()
    failure = next(d for d in operator.devices() if d.device_id == tried).failures[CLIENT]
    assert failure.version == 3000 and "did not stay up" in failure.detail
    wait_for(lambda: all(device.online for device in operator.devices()), LONG, "all run on")

    # By the operator's own word, too, and with nothing sent again: the version before is still there.
    operator.publish_client([own_bundle("0.4.0")])
    rollout = world.start("0.4.0", 100.0)
    world.wait(rollout, "completed")
    world.all_run("0.4.0")
    operator.turn_rollout(rollout, "rollback")
    world.all_run("0.2.0")
    assert [each.record.stage for each in operator.releases()] == [
        "stable",
        "stable",
        "withdrawn",
        "withdrawn",
    ]
