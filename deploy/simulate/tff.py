"""The engine that is TensorFlow Federated: files and a pipe to a process in TFF's own environment.

TFF is never a dependency of the service or a device: its environment (`make setup-parity`, 2.4 GB) is found
by COVEY_TFF_PYTHON or in the working directory, and is given `models` and `protocol`, nothing else of ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import models
import protocol
from deploy.simulate.options import SimulationError
from deploy.simulate.task import RoundOutcome, Task
from edge_client.scoring import scaled_targets
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.parameters import PrivacyMode

PYTHON_VARIABLE = "COVEY_TFF_PYTHON"
WORKER = Path(__file__).parent / "tff_worker.py"
"""Never imported here: it needs TFF."""
MAX_BITS = 22
"""TFF's own limit on the ring of its distributed mode."""
_LOG_TAIL = 2000


def find_python() -> Path:
    """TFF's interpreter.

    Raises:
        SimulationError: there is none.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else Path(".venv-tff") / "bin" / "python"
    if shutil.which(python) is None:
        where = f"{PYTHON_VARIABLE}={given} does not run" if given else "there is no .venv-tff here"
        raise SimulationError(
            f"TensorFlow Federated is not installed: {where}. Run `make setup-parity` (Python 3.11, 2.4 GB), "
            f"set {PYTHON_VARIABLE} to an interpreter that has it, or use --engine local"
        )
    return python.absolute()


def check_tff(task: Task) -> None:
    """Refuses what TFF cannot do.

    Raises:
        SimulationError: it says what it can.
    """
    privacy = task.settings.privacy
    if privacy.mode not in (PrivacyMode.NONE, PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED):
        raise SimulationError(
            f"TFF has no mode {privacy.mode}: it does none, central and distributed; --engine local does it"
        )
    if privacy.adaptive is not None and privacy.mode is not PrivacyMode.CENTRAL:
        raise SimulationError(
            "with --engine tff a clip norm adapts in central mode only; --engine local adapts it in all"
        )
    if privacy.mode is PrivacyMode.DISTRIBUTED and privacy.bits > MAX_BITS:
        raise SimulationError(f"TFF's ring has at most {MAX_BITS} bits, the plan {privacy.bits}")
    if task.manifest.local_parameters:
        raise SimulationError("TFF's averaging has no layers that stay on a device; --engine local has them")


def run_tff(task: Task) -> Generator[RoundOutcome, None, None]:
    """Yields every round; whatever ends the iteration, no process of TFF's is left.

    Raises:
        SimulationError: TFF is not there, cannot do it, or failed.
    """
    check_tff(task)
    python = find_python()
    with tempfile.TemporaryDirectory(prefix="covey-simulate-") as name:
        directory = Path(name)
        _write_task(task, directory)
        with _worker(python, directory) as results:
            for number in range(1, task.rounds + 1):
                said = _next(results, directory)
                weights = np.load(directory / f"round-{number}.npy")
                if not np.isfinite(weights).all():
                    raise SimulationError(f"round {number}: training diverged: lower the learning rate")
                yield RoundOutcome(weights, _event(task, number, said), 0, float(said["seconds"]))


@contextlib.contextmanager
def _worker(python: Path, directory: Path) -> Iterator[Any]:
    """Runs the worker in a process group of its own; yields the lines that it writes.

    The group's leader is not waited for before the group is killed, so that its id can be nobody else's.
    """
    packages = directory / "packages"
    packages.mkdir()
    for package in (models, protocol):
        # Not our whole site-packages, whose TensorFlow and NumPy would shadow TFF's.
        (packages / package.__name__).symlink_to(Path(str(package.__file__)).parent)
    read, write = os.pipe()
    with (directory / "log").open("wb") as log, os.fdopen(read) as results:
        try:
            process = subprocess.Popen(
                [python, "-P", WORKER, directory, str(write)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                process_group=0,
                env=os.environ | {"PYTHONPATH": str(packages), "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
        finally:
            os.close(write)
        try:
            yield results
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _next(results: Any, directory: Path) -> dict[str, Any]:
    """The worker's next line."""
    while not select.select([results], [], [], 1.0)[0]:
        pass  # so that Python gets to see signals
    line = results.readline()
    said: dict[str, Any] = json.loads(line) if line else {}
    if "error" in said or not said:
        tail = (directory / "log").read_text(errors="replace")[-_LOG_TAIL:]
        raise SimulationError(f"TFF failed: {said.get('error') or f'it ended by itself: {tail}'}")
    return said


def _write_task(task: Task, directory: Path) -> None:
    manifest, settings = task.manifest, task.settings
    mean, std = np.asarray(manifest.input.mean, np.float32), np.asarray(manifest.input.std, np.float32)
    arrays = {}
    for index, device in enumerate(task.devices):
        arrays[f"x{index}"] = (device.x - mean) / std
        arrays[f"y{index}"] = scaled_targets(manifest, device.y)
    np.savez(directory / "devices.npz", **arrays)
    np.save(directory / "weights.npy", task.model.weights)
    content = {
        "source": task.source,
        "loss": manifest.loss,
        "optimizer": manifest.optimizer.model_dump(),
        "step": manifest.train_batch_size * manifest.accumulation,
        "local_epochs": task.training.local_epochs,
        "learning_rate": task.training.learning_rate,
        "proximal_mu": task.training.proximal_mu,
        "server": task.server.value,
        "server_rate": task.optimizer.learning_rate,
        "server_tau": getattr(task.optimizer, "tau", 0.0),
        "privacy": settings.privacy.model_dump(mode="json"),
        "cohort": settings.cohort.size,
        "min_survivors": settings.cohort.minimum_survivors,
        "cohorts": [task.cohort(number) for number in range(1, task.rounds + 1)],
        "seed": task.seed,
    }
    (directory / "task.json").write_text(json.dumps(content))


def _event(task: Task, number: int, said: dict[str, Any]) -> DPEvent | None:
    """TFF's distributed release by its own figures: its norm bound exceeds what its noise is sized for."""
    if "scaled_inflated_l2" not in said:
        return None
    privacy = task.settings.privacy
    return DPEvent(
        mechanism=Mechanism(privacy.noise.value),
        mode=PrivacyMode.DISTRIBUTED,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        sensitivity_squared=math.ceil(said["scaled_inflated_l2"] ** 2),
        variance_per_share=said["scaled_local_stddev"] ** 2,
        dimension=int(said["padded_dim"]),
        survivors=len(task.cohort(number)),
        minimum_survivors=task.settings.cohort.minimum_survivors,
        colluders=privacy.colluders,
    )
