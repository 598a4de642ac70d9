"""Unmasking on several cores: the bits of one core, whoever dies, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.adapters.cores import Cores
from protocol.secagg import masking
from protocol.secagg.masking import Mask, apply_masks
from protocol.secagg.prg import SLICE_WORDS
from tests.secagg_round import entropy

MASKS = [Mask(entropy("mask", i), bool(i % 3)) for i in range(9)]
LENGTH = 5 * SLICE_WORDS + 123


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cores]:
    monkeypatch.setattr(masking, "PARALLEL_WORDS", 0)
    with Cores(2) as cores:
        yield cores


def sums() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """A sum of masked inputs, and what must come of it."""
    vector = np.random.default_rng(1).integers(0, 2**32, LENGTH, dtype=np.uint32)
    expected = vector.copy()
    apply_masks(expected, MASKS)
    return vector, expected


def workers_of(pid: int) -> list[int]:
    """Its child processes that run Python code for it, and not the tracker of its resources."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [int(child) for child in children]
    return [c for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_the_bits_of_one_core_sum_after_sum(cores: Cores) -> None:
    for _ in range(2):
        vector, expected = sums()
        cores.unmask(vector, MASKS)
        np.testing.assert_array_equal(vector, expected)
    assert len(workers_of(os.getpid())) >= 1


def test_workers_that_are_killed_cost_no_bits(cores: Cores) -> None:
    vector, expected = sums()
    cores.unmask(vector, MASKS)
    for pid in workers_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    for _ in range(3):  # with broken workers, without, and with new ones
        vector, expected = sums()
        cores.unmask(vector, MASKS)
        np.testing.assert_array_equal(vector, expected)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, for which nobody may ask any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


SERVICE = """
import numpy as np, time
from aggregator.adapters.cores import Cores
from protocol.secagg import masking
if __name__ == "__main__":
    masking.PARALLEL_WORDS = 0
    cores = Cores(2)
    cores.unmask(np.zeros(200_000, np.uint32), [masking.Mask(bytes(32), False)])
    print("ready", flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_service_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == b"ready\n"
        workers = workers_of(service.pid)
        service.kill()
    assert workers
    patience = time.monotonic() + 120
    while any(map(runs, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def test_workers_import_nothing_of_the_command_line() -> None:
    """A spawned process imports the script of the command; what that imports would stay in its memory."""
    (command,) = entry_points(group="console_scripts", name="covey")
    script = f"import sys; from {command.module} import {command.attr}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"typer", "pydantic", "numpy", "aggregator.main"}.intersection(done.stdout.split())
