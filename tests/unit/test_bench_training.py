"""The benchmark of training: its process for a runtime, and the form of what it writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from benchmarks.training import Peer, StepResult
from models import zoo

ZOO = Path(str(zoo.__file__)).parent
STEPS = Path(__file__).parents[2] / "benchmarks" / "training_steps.py"


def test_results_have_the_promised_fields() -> None:
    names = "model runtime threads batch step_s peak_rss_bytes step_over_tf step_over_torch"
    assert [field.name for field in fields(StepResult)] == names.split()


def test_a_process_measures_its_runtime_as_often_as_it_is_asked() -> None:
    peer = Peer(sys.executable, "small", ZOO / "watch", 1)
    peer.repeat()
    peer.repeat()
    peak = peer.finish()
    assert peer.runtime in {"tflite-runtime", "ai-edge-litert"}
    assert len(peer.times) == 2
    assert all(seconds > 0 for seconds in peer.times)
    assert 20e6 < peak < 200e6


def test_installed_packages_count_with_all_that_they_need() -> None:
    def size(name: str) -> int:
        command = [sys.executable, str(STEPS), "size", name]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert size("no-such-package") == 0
    assert size("numpy") < size("covey")
