"""One fold's federation: an aggregator and its devices, each a process with a state directory of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aggregator import main as covey
from aggregator.operations import Operator
from deploy.demo.accidents import Action
from deploy.demo.options import DemoError
from deploy.demo.processes import ChildProcess, ProcessGroup
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models.examples import Examples
from protocol.dp.parameters import PrivacyMode

_POLL_SECONDS = 0.05
_DEVICE_ENVIRONMENT = {"PYTHONNODEBUGRANGES": "1", "PYTHONOPTIMIZE": "2"}
"""As a bundle's launcher sets it: docstrings, and columns in tracebacks, are memory it can do without."""
_SCRIPTS = Path(sys.executable).parent


@dataclass(slots=True)
class Fleet:
    """What runs in one fold.

    Attributes:
        operator: the aggregator's operations and read-only views.
        state: the aggregator's state directory.
        directory: of this fold; everything in it goes when the demo ends.
        aggregator: its process.
        devices: device id -> process; the people in training first, then those held out.
        held_out: devices that hold no training data: they only receive versions and answer predictions.
    """

    operator: Operator
    state: Path
    directory: Path
    aggregator: ChildProcess
    devices: dict[str, ChildProcess] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()

    def act(self, action: Action) -> None:
        """Freezes, kills or restarts one device."""
        device = self.devices[action.device]
        if action.kind == "freeze":
            device.send(signal.SIGSTOP)
        elif action.kind == "kill":
            device.kill()
        else:
            device.start()

    def wait_for_version(
        self, model: str, version: int, seconds: float, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Waits until every device answers with this version of the model.

        Raises:
            DemoError: some device does not.
        """
        deadline = time.monotonic() + seconds
        while True:
            ready = {
                device.device_id
                for device in self.operator.devices()
                if device.online and device.models.get(model) == version
            }
            missing = self.devices.keys() - ready
            if not missing:
                return
            if time.monotonic() > deadline:
                raise DemoError(f"{', '.join(sorted(missing))} did not take version {version} of {model}")
            alive()
            time.sleep(_POLL_SECONDS)

    def predict(self, device_id: str, examples: Examples) -> tuple[int, list[str]]:
        """Lets a device answer for these examples; returns its version and the labels.

        Raises:
            DemoError: it cannot.
        """
        inputs = self.directory / device_id / "inputs.npy"
        np.save(inputs, examples.x)
        state = self.directory / device_id / "state"
        command: list[str | Path] = [_SCRIPTS / "covey-edge", "predict", "--state", state]
        finished = subprocess.run(
            [*command, "--input", inputs, "--json"], capture_output=True, check=False, timeout=120
        )
        if finished.returncode != 0:
            raise DemoError(f"{device_id} cannot predict: {finished.stderr.decode(errors='replace').strip()}")
        answer = json.loads(finished.stdout)
        return answer["version"], [item["label"] for item in answer["predictions"]]


@contextmanager
def fleet(
    processes: ProcessGroup,
    broker: str,
    name: str,
    model_directory: Path,
    training: Sequence[Examples],
    held_out: Sequence[Examples],
    policy: DevicePolicy,
) -> Iterator[Fleet]:
    """Enrols and starts one fold's fleet, and stops it at the end.

    Args:
        processes: the children of the demo.
        broker: its address.
        name: of the fold, in file and process names.
        model_directory: manifest, graph and weights of version 1.
        training: one device each.
        held_out: one device each, without training data.
        policy: what every device agrees to.
    """
    directory = processes.directory / name
    state = directory / "aggregator"
    directory.mkdir()
    covey.init(state, fleet="demo", broker=broker)
    covey.publish(state, model_directory)
    with covey.open_operator(state) as operator:
        service = processes.start(
            f"{name}-aggregator",
            [_SCRIPTS / "covey", "aggregator", "run", "--state", state, "--listen", "127.0.0.1:0"],
        )
        running = Fleet(
            operator, state, directory, service, held_out=tuple(person.name for person in held_out)
        )
        try:
            for person in (*training, *held_out):
                place = directory / person.name
                data = place / "data"
                data.mkdir(parents=True)
                if person.name not in running.held_out:
                    person.save(data / "recordings.npz")
                enrol(place / "state", operator.enrol(initialise(place / "state", person.name)))
                set_policy(place / "state", policy)
                # All of the fleet on one machine: nobody is to give way to it.
                own = ("run", "--priority", "normal", "--state", place / "state")
                command: list[str | Path] = [_SCRIPTS / "covey-edge", *own]
                running.devices[person.name] = processes.start(
                    f"{name}-{person.name}",
                    [*command, "--broker", broker, "--data", data],
                    _DEVICE_ENVIRONMENT,
                )
            yield running
        finally:
            children = (*running.devices.values(), service)
            for child in children:
                # A frozen process cannot end.
                child.send(signal.SIGCONT)
                child.sample()
                child.send(signal.SIGTERM)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    child.stop()


def device_policy(mode: PrivacyMode, survivors: int) -> DevicePolicy:
    """The policy of the demo's devices: the demo's own mode, and no sum of fewer than `survivors`."""
    return DevicePolicy(
        minimum_cohort=survivors,
        minimum_survivors=survivors,
        privacy_modes=frozenset({mode}),
        maximum_epsilon=None,  # a dozen devices cannot keep to a useful one; the report prints what it is
    )
