"""What is lost when the aggregator is killed at a boundary of a rollout: real process, SIGKILL.

Part of `benchmarks/faults.py`. Four devices serve version 1; version 2 reaches half of them, then all. It is
good, or runs nowhere, or an operator stops it. The aggregator dies at one boundary, and commands that got no
answer are given again. Lost is what differs from a rollout that nothing happened to: a device without the
version that it is to have, one that was sent back and forth or reached in vain, a step that was taken twice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import main as covey
from aggregator.client import ApiError, Client, Unreachable
from aggregator.rollout_operations import RolloutRequest, RolloutView, Turn
from aggregator.web.local import LocalEndpoint
from benchmarks.faults_outcome import Outcome
from benchmarks.faults_service import Trap
from deploy.broker import BrokerProcess
from protocol.identity import create_request
from tests.aggregator_devices import model_files
from tests.aggregator_process import COMMAND, ServiceProcess
from tests.told_devices import MODEL, ToldDevices, ToldFleet

NAMES = tuple(f"device-{number}" for number in range(4))
FIRST_WAVE = 2
SECONDS = 120.0
FOREVER_SECONDS = 86_400.0


@dataclass(frozen=True)
class _Rollout:
    """A service that may die, and the operator who insists."""

    state: Path
    service: ServiceProcess
    fleet: ToldFleet

    @property
    def answers(self) -> bool:
        """Whether its API is there."""
        return LocalEndpoint.read(self.state / "api") is not None

    def insist(self, done: Callable[[Client], bool], act: Callable[[Client], object]) -> None:
        """Acts until an operation is `done`."""

        def asked() -> bool:
            try:
                with covey.connect(self.state) as client:
                    if done(client):
                        return True
                    act(client)
            except (Unreachable, ApiError):
                pass  # it was killed while it answered; or it had heard already
            return False

        self.wait(asked)

    def wait(self, done: Callable[[], bool]) -> None:
        """Waits until `done`; a service that dies is started again."""
        give_up = time.monotonic() + SECONDS
        while not done():
            if self.service.ended:
                assert self.service.end(signal.SIGKILL) == -signal.SIGKILL, self.service.log
                self.service.program = COMMAND
                self.service.start()
            assert time.monotonic() < give_up, f"not done after {SECONDS} s\n{self.service.log}"
            time.sleep(0.05)

    def view(self) -> RolloutView:
        """The rollout, as it is on disk."""
        with covey.open_operator(self.state) as operator:
            return operator.rollouts()[0]


def run_rollout_case(boundary: str, side: str) -> Outcome:
    """Runs one rollout, and kills the aggregator in it."""
    with (
        tempfile.TemporaryDirectory(prefix="covey-faults-") as directory,
        BrokerProcess("mosquitto") as broker,
    ):
        mark, state = Path(directory) / "struck", Path(directory) / "state"
        _prepare(state)
        service = ServiceProcess(state, broker.url)
        service.program = (
            str(Path(__file__).with_name("faults_service.py")),
            Trap(boundary, side, str(mark)).to_json(),
        )
        devices = ToldDevices(NAMES, bad=2 if boundary == "fail a gate" else None)
        with ToldFleet(devices, broker.host, broker.port) as fleet, service:
            rollout = _Rollout(state, service, fleet)
            rollout.wait(lambda: rollout.answers)
            lost = _play(rollout, boundary, mark)
            code = service.end(signal.SIGTERM)
            clean = code == 0 and "Traceback" not in service.log
            if (lost or not clean) and os.environ.get("COVEY_FAULTS_LOG"):
                print(service.log, fleet.had(), fleet.errors, sep="\n", file=sys.stderr)
        with covey.open_operator(state) as operator:
            outcome = operator.rollouts()[0].record.status
    return Outcome(f"rollout: {boundary}, {side}", "aggregator", outcome if clean else "failed", 0, lost, 0)


def _prepare(state: Path) -> None:
    covey.init(state, fleet="orchard")
    settings = state / "aggregator.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "promotion": "manual"}))
    with covey.open_operator(state) as operator:
        operator.publish(*model_files())
        with operator.repository.write() as writer:
            writer.set_stage(MODEL, 1, "stable")
        operator.publish(*model_files(seed=1))
        for name in NAMES:
            operator.enrol(create_request(Ed25519PrivateKey.generate(), name))


def _play(rollout: _Rollout, boundary: str, mark: Path) -> int:
    """Brings a rollout to its end, with whatever leads across the boundary; returns what is lost."""
    stopped = boundary in ("halt", "roll back")
    request = RolloutRequest(
        MODEL,
        2,
        (50.0, 100.0),
        gate=("errors<0.5",),
        soak_seconds=FOREVER_SECONDS if stopped else 0.3,
    )
    rollout.insist(lambda client: bool(client.rollouts()), lambda client: client.start_rollout(request))
    if stopped:
        rollout.wait(lambda: "soak" in getattr(rollout.view().progress.state, "waits_for", ""))
    if boundary == "halt":
        turn(rollout, "halt", "halted")
        assert sum(2 in had for had in rollout.fleet.had().values()) == FIRST_WAVE
    wanted, stage, version = ("completed", "stable", 2)
    if stopped or boundary == "fail a gate":
        wanted, stage, version = ("rolled-back", "withdrawn", 1)
    if stopped:
        turn(rollout, "rollback", wanted)
    rollout.wait(lambda: rollout.view().record.status == wanted and mark.exists())
    # By a service that has come back, though nothing may be left for it to do.
    rollout.wait(lambda: rollout.service.program == COMMAND and rollout.answers)
    rollout.wait(lambda: rollout.fleet.settled(version))
    had, view = rollout.fleet.had().values(), rollout.view()
    with covey.open_operator(rollout.state) as operator:
        stages = [each.stage for each in operator.versions(MODEL)]
    steps = [(step.wave, step.what) for step in view.progress.steps]
    lost = len(steps) - len(set(steps)) + len(rollout.fleet.errors)
    lost += stages != ["stable", stage]
    # Nobody goes to and fro; a version that is taken back has been with the first wave only.
    ways = [[1, 2]] * len(NAMES) if version == 2 else [[1]] * FIRST_WAVE + [[1, 2, 1]] * FIRST_WAVE
    lost += sum(way != had for way, had in zip(ways, sorted(had), strict=True))
    return lost


def turn(rollout: _Rollout, how: Turn, status: str) -> None:
    """An operator turns the rollout, once."""
    rollout.insist(
        lambda client: client.rollouts()[0].status == status,
        lambda client: client.turn_rollout(client.rollouts()[0].rollout, how),
    )
