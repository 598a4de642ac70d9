"""The first moments of `covey-edge run`: a signal then ends it as later, and leaves nothing half done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.broker import BrokerProcess
from edge_client.commands.state_lock import is_running
from edge_client.policy import DevicePolicy
from models import zoo
from tests.edge_broker import Device, Fleet, Hub, command, wait_for


def caught(pid: int) -> int:
    """The signals that a process handles itself, as a mask (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)


def hears(device: Device, number: signal.Signals) -> bool:
    return bool(caught(device.pid) >> (number - 1) & 1)


def test_a_signal_at_any_moment_of_the_start_is_a_wish_to_stop(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    fleet, manifest = Fleet(tmp_path), zoo.load("watch").manifest
    state = fleet.enrolled("barn-1", DevicePolicy())
    before = {path.name for path in state.iterdir()}
    device = Device(state, fleet.data("barn-1", manifest), mosquitto)
    moments = ((signal.SIGTERM, 0.0), (signal.SIGINT, 0.0), (signal.SIGTERM, 0.5), (signal.SIGINT, 1.0))
    with Hub(mosquitto) as hub, ExitStack() as stack:
        stack.callback(device.stop)
        for number, later in moments:
            device.start()
            # Python hears SIGINT from the beginning, in a way of its own; this process both at one time.
            wait_for(lambda: hears(device, signal.SIGTERM), 60, "the process to listen")
            time.sleep(later)
            device.signal(number)
            assert device.wait(60) == 0
            assert not is_running(state)
            if not later:
                assert {path.name for path in state.iterdir()} == before
        device.start()
        wait_for(lambda: hub.online("barn-1"), 60, "the device, which goes on as if nothing had been")
        assert device.stop() == 0


@pytest.mark.parametrize(
    ("options", "nice", "disk"), [((), 10, "idle"), (("--priority", "normal"), 0, "none")]
)
def test_by_hand_it_gives_way_as_the_unit_does(
    tmp_path: Path, options: tuple[str, ...], nice: int, disk: str
) -> None:
    program = shutil.which("ionice")
    if program is None:
        pytest.skip("ionice is not installed")
    fleet, manifest = Fleet(tmp_path), zoo.load("watch").manifest
    state = fleet.enrolled("barn-1", DevicePolicy())
    data = fleet.data("barn-1", manifest)
    line = command("run", "--state", state, "--data", data, "--broker", "mqtt://127.0.0.1:1", *options)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None and "started device=barn-1" in process.stderr.readline()
            # Every thread: a process is only as nice as they are.
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                niceness = int((task / "stat").read_text().rpartition(")")[2].split()[16])
                assert niceness == max(nice, os.getpriority(os.PRIO_PROCESS, 0))
                shown = subprocess.run(
                    [program, "-p", task.name], capture_output=True, text=True, check=True, timeout=30
                ).stdout
                assert shown.startswith(disk)
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0
