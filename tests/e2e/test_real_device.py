"""The whole way of a device: image, `covey flash`, first boot, enrolment, rounds, a reset, new versions.

The device is an emulated arm64 machine that boots what was flashed, and enrols itself by the ticket on its
card; broker, aggregator and three more devices run on this machine. SSH, by the key that `covey flash` put
onto the card, is only for looking at it, and for its recordings.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator import records
from deploy.broker import find_mosquitto, free_port
from deploy.bundle.build import TARGETS, build_bundle
from deploy.image.build import build_image
from deploy.image.root import RootRecipe, default_cache, root_archive
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from models.datasets import watch
from models.examples import Examples
from protocol.client_release import CLIENT, version_number
from tests.aggregator_process import COMMAND, ServiceProcess
from tests.arm64_system import HOST, Machine, missing_programs
from tests.client_bundles import CRASH, revised
from tests.edge_broker import Device, running, wait_for
from tests.fleet_broker import FleetBroker

SOURCES = [Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")]
PROGRAMS = ("ssh", "ssh-keygen", "mmdebstrap", "mke2fs", "sfdisk")
MISSING = [*missing_programs(), *(name for name in PROGRAMS if shutil.which(name) is None)]
pytestmark = [
    pytest.mark.arm64,
    pytest.mark.timeout(2_700),
    pytest.mark.skipif(bool(MISSING) or find_mosquitto() is None, reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="building an image needs root"),
]
POLICY = DevicePolicy(minimum_cohort=3, minimum_survivors=3, maximum_epsilon=None)
NAME = "barn-1"
ADMIN = "admin"
BOOT_SECONDS = 600
MEMORY_LIMIT = 70 * 10**6
"""Bytes resident of the client while it trains; the figure itself is printed."""
ROUND = (
    "--model", "watch", "--cohort", 4, "--minimum", 4, "--min-survivors", 3, "--rest", 0,
    "--privacy", "distributed", "--noise-multiplier", 0.01,
    "--gather", 60, "--advertise-seconds", 120, "--share-seconds", 120, "--input-seconds", 300,
    "--check-seconds", 120, "--unmask-seconds", 120,
)  # fmt: skip


def run(*arguments: object, seconds: float = 300) -> str:
    """`covey`, as a person types it."""
    done = subprocess.run(
        [sys.executable, *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Guest:
    """The emulated device, as seen through SSH."""

    config: Path
    said: str = ""
    """What ssh said when nobody could log in."""

    @classmethod
    @contextmanager
    def at(cls, folder: Path, port: int) -> Iterator[Guest]:
        """Its key and configuration, in a folder; one connection serves all that follows."""
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id"], check=True, timeout=30
        )
        config = folder / "ssh_config"
        # A socket's path has 108 bytes at most, of which ssh needs 17 itself; a test's folder is longer.
        with tempfile.TemporaryDirectory(prefix="ssh-") as short:
            config.write_text(
                f"Host {NAME}\n HostName 127.0.0.1\n Port {port}\n User {ADMIN}\n IdentityFile {folder}/id\n"
                f" IdentitiesOnly yes\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
                " LogLevel ERROR\n"
                f" ConnectTimeout 60\n ControlMaster auto\n ControlPath {short}/s\n ControlPersist 120\n"
            )
            guest = cls(config)
            try:
                yield guest
            finally:
                guest.forget()

    def run(self, script: str, stdin: bytes | None = None) -> str:
        """Runs a script as root on the device."""
        done = self._ssh(f"sudo sh -c '{script}'", stdin)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout.decode()

    def answers(self) -> bool:
        """Whether somebody can log in."""
        done = self._ssh("true", None)
        self.said = done.stderr.decode(errors="replace")
        return done.returncode == 0

    def edge(self, *arguments: object) -> dict[str, Any]:
        """`covey-edge ... --json` as the client's user."""
        words = " ".join(map(str, arguments))
        user = "setpriv --reuid=covey --regid=covey --clear-groups"
        found = self.run(f"{user} covey-edge {words} --state /var/lib/covey --json")
        answer: dict[str, Any] = json.loads(found)
        return answer

    def forget(self) -> None:
        """Drops the connection that a reset machine knows nothing of."""
        subprocess.run(
            ["ssh", "-F", self.config, "-O", "exit", NAME], capture_output=True, check=False, timeout=30
        )

    def _ssh(self, command: str, stdin: bytes | None) -> subprocess.CompletedProcess[bytes]:
        # The connection stays in the background: it must not hold our pipes.
        return subprocess.run(
            ["ssh", "-F", self.config, "-o", "BatchMode=yes", NAME, command],
            input=stdin if stdin is not None else b"",
            capture_output=True,
            check=False,
            timeout=180,
        )


class Session:
    """The fleet of this test: its aggregator's state directory, and what it says of its devices."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def device(self, name: str) -> records.Device:
        """Read here: a command each time would take the emulated machine's cores."""
        with covey.open_operator(self.state) as operator:
            return operator.device(name)

    def online(self, name: str) -> bool:
        return self.device(name).online

    def version(self, name: str) -> int:
        return self.device(name).models.get("watch", 0)

    def rollout(self) -> str:
        """What became of the latest rollout."""
        with covey.open_operator(self.state) as operator:
            return operator.rollouts()[-1].record.status

    def last_round(self) -> Any:
        with covey.open_operator(self.state) as operator:
            return operator.rounds()[-1]

    def start(self, number: int) -> None:
        """Asks for one round, and waits until the aggregator has it."""
        run("round", "start", "--state", self.state, "--rounds", 1, *ROUND)
        wait_for(lambda: self._count() >= number, 120, f"round {number}")

    def _count(self) -> int:
        with covey.open_operator(self.state) as operator:
            return len(operator.rounds())

    def ended(self) -> bool:
        return self.last_round().record.status != "running"


def slow(condition: Callable[[], object]) -> Callable[[], bool]:
    """A condition that costs a process to look at: at most every two seconds."""

    def look() -> bool:
        time.sleep(2)
        return bool(condition())

    return look


def test_from_an_image_to_a_new_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {text}")
            sys.stdout.flush()

    people = {person.name: person for person in watch.load()}
    base, card = tmp_path / "base.img", tmp_path / "card.img"
    sources = next(path for path in SOURCES if path.is_file())
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        building = beside.submit(build_bundle, TARGETS["bookworm-arm64"], tmp_path / "dist")
        build_image(root_archive(RootRecipe(), default_cache(), sources), base)
        bundle = building.result()
    say(f"image and bundle: {time.monotonic() - begun:.0f} s; bundle {bundle.stat().st_size / 1e6:.1f} MB")
    assert bundle.stat().st_size < 20 * 10**6

    state, port, api_port, ssh_port = tmp_path / "agg", free_port(), free_port(), free_port()
    run(
        "aggregator", "init", "--state", state, "--fleet", "orchard", "--broker", f"mqtts://{HOST}:{port}",
        "--broker-name", "localhost", "--api-url", f"https://{HOST}:{api_port}",
    )  # fmt: skip
    tickets = tmp_path / "tickets"
    run("device", "token", "--name", NAME, "--label", "site=barn", "--out", tickets, "--state", state)
    fleet = Session(state)
    with ExitStack() as stack:
        guest = stack.enter_context(Guest.at(tmp_path, ssh_port))
        run(
            "flash", base, "--out", card, "--tickets", tickets, "--user", ADMIN,
            "--ssh-key", tmp_path / "id.pub", "--bundle", bundle,
        )  # fmt: skip
        base.unlink()
        machine_folder = tmp_path / "m"
        machine_folder.mkdir()
        broker = stack.enter_context(FleetBroker(state, port))
        service = ServiceProcess(state, broker.url)
        service.options = ("--listen", f"https://127.0.0.1:{api_port}")
        stack.enter_context(service)
        wait_for(lambda: covey.is_running(state), what="the service")
        run("model", "publish", Path(zoo.__file__).parent / "watch", "--state", state)

        power_on = time.monotonic()
        machine = stack.enter_context(Machine(card, machine_folder, ssh_port=ssh_port))
        machine.wait_for("covey-setup: enrolled: starting the client", BOOT_SECONDS)
        enrolled = time.monotonic() - power_on
        assert fleet.device(NAME).labels == ("site=barn",)
        machine.wait_until(slow(lambda: fleet.online(NAME)), 300, "the device checks in")
        joined = time.monotonic() - power_on
        say(f"power-on to enrolled by its ticket: {enrolled:.0f} s; to first check-in: {joined:.0f} s")
        wait_for_ssh(machine, guest)
        left = guest.run("ls /boot/firmware/covey; stat -c %a:%U /var/lib/covey/identity.pem")
        assert left.split() == ["600:covey"], "the card keeps no ticket; the key is the client's alone"
        give_data(guest, people["person-01"], tmp_path)
        guest.run("systemctl restart covey-edge.service")
        unit = guest.run("systemctl show -p User,MainPID,ActiveState,NoNewPrivileges covey-edge.service")
        assert "ActiveState=active" in unit and "User=covey" in unit and "NoNewPrivileges=yes" in unit

        others = [host_device(state, broker, people[f"person-0{number}"]) for number in (2, 3, 4)]
        stack.enter_context(running(*others))
        everybody = (NAME, *(device.state.name for device in others))
        machine.wait_until(slow(lambda: all(map(fleet.online, everybody))), 120, "everybody is online")

        fleet.start(1)
        machine.wait_until(slow(fleet.ended), 600, "the first round ends")
        first = fleet.last_round()
        assert first.record.status == "completed", (first, service.log[-3000:])
        assert len(first.report.survivors) == 4, first
        machine.wait_until(slow(lambda: fleet.version(NAME) == 2), 300, "the device has version 2")
        report_memory(guest, say)

        # The button is pressed while the device has shared its keys and its update is asked for.
        fleet.start(2)
        machine.wait_until(
            lambda: any(phase.phase == "MaskedInput" for phase in fleet.last_round().report.phases),
            300,
            "the second round comes to its training",
        )
        machine.reset()
        guest.forget()
        reset = time.monotonic()
        machine.wait_until(slow(fleet.ended), 900, "the second round ends")
        second = fleet.last_round()
        assert second.record.status == "completed", (second, service.log[-3000:])
        say(f"reset in the round: it completed with the updates of {len(second.report.survivors)} of 4")
        machine.wait_until(slow(lambda: fleet.version(NAME) == 3), BOOT_SECONDS, "the device has version 3")
        say(f"reset to version 3 on the device: {time.monotonic() - reset:.0f} s")

        wait_for_ssh(machine, guest)
        answer = guest.edge("predict", "--input", "/srv/covey/held-out.npy")
        assert answer["version"] == 3
        labels = [prediction["label"] for prediction in answer["predictions"]]
        right = sum(
            label == watch.LABELS[y] for label, y in zip(labels, people["person-05"].y[::20], strict=True)
        )
        say(f"answers of version 3 on the device: {right} of {len(labels)} right")
        assert right > len(labels) / 7, "better than chance among seven exercises"
        ledger = guest.edge("privacy")
        assert ledger, "what it contributed outlives the reset"
        say(f"everything so far: {time.monotonic() - begun:.0f} s")
        crashing_client(fleet, machine, guest, bundle, say)
        say(f"everything: {time.monotonic() - begun:.0f} s")


def crashing_client(
    fleet: Session, machine: Machine, guest: Guest, bundle: Path, say: Callable[[str], None]
) -> None:
    """A new client that passes its self-test and crashes when it runs: root's program takes it back."""
    began = time.monotonic()
    path = bundle.with_name("covey-0.1.1-bookworm-arm64.tar.xz")
    path.write_bytes(
        revised(bundle, "0.1.1", {"site/edge_client/commands/running.py": lambda content: content + CRASH})
    )
    run("client", "publish", path, "--state", fleet.state)
    run("client", "rollout", "0.1.1", "--percent", 100, "--gate", "errors<0.5", "--state", fleet.state)
    machine.wait_until(slow(lambda: fleet.rollout() == "rolled-back"), 600, "the rollout goes back")
    say(f"rollout of a client that crashes, until it is back: {time.monotonic() - began:.0f} s")
    device = fleet.device(NAME)
    assert device.client_version == "0.1.0" and device.models[CLIENT] == version_number("0.1.0")
    failure = device.failures[CLIENT]
    assert failure.version == version_number("0.1.1") and "did not stay up" in failure.detail, failure
    wait_for_ssh(machine, guest)
    found = guest.run(
        "readlink /opt/covey/current /opt/covey/good; ls /opt/covey/versions /opt/covey/refused;"
        " systemctl is-active covey-edge.service; journalctl -b -o cat -u covey-edge.service | grep crashes"
    )
    assert found.split()[:2] == ["versions/0.1.0"] * 2 and "0.1.1" in found and "this client crashes" in found
    assert fleet.version(NAME) == 3 and "active" in found.split()
    assert guest.run("stat -c %U:%a /opt/covey/versions").strip() == "root:755"


def wait_for_ssh(machine: Machine, guest: Guest) -> None:
    try:
        machine.wait_until(slow(guest.answers), 300, "SSH answers")
    except AssertionError as error:
        raise AssertionError(f"ssh said: {guest.said}") from error


def give_data(guest: Guest, person: Examples, folder: Path) -> None:
    """The device's own recordings, another person's windows to answer for, and its owner's policy."""
    person.save(folder / "recordings.npz")
    np.save(folder / "held-out.npy", next(p for p in watch.load() if p.name == "person-05").x[::20])
    for name in ("recordings.npz", "held-out.npy"):
        guest.run(f"cat > /srv/covey/{name} && chmod 644 /srv/covey/{name}", (folder / name).read_bytes())
    policy = "install -m 600 -o covey -g covey /dev/null /var/lib/covey/policy.json"
    guest.run(f"{policy} && cat > /var/lib/covey/policy.json", POLICY.to_bytes())


def host_device(state: Path, broker: FleetBroker, person: Examples) -> Device:
    own = state.parent / person.name
    enrol(own, covey.enrol(state, initialise(own, person.name)))
    set_policy(own, POLICY)
    data = state.parent / f"{person.name}-data"
    data.mkdir()
    person.save(data / "recordings.npz")
    return Device(own, data, broker)  # type: ignore[arg-type]


def report_memory(guest: Guest, say: Callable[[str], None]) -> None:
    """Prints what the client took while it trained: the largest process, and the whole service."""
    found = guest.run(
        "cat /sys/fs/cgroup/system.slice/covey-edge.service/memory.peak; "
        "pid=$(systemctl show -P MainPID covey-edge.service); grep -h VmHWM /proc/$pid/status"
    ).split()
    service, process = int(found[0]), int(found[2]) * 1024
    say(f"while training: process {process / 2**20:.0f} MiB resident, its cgroup {service / 2**20:.0f} MiB")
    assert process <= MEMORY_LIMIT
