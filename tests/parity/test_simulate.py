"""`covey simulate --engine tff`: the same campaign as Covey's own engine, and no process left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("COVEY_TFF_PYTHON", ROOT / ".venv-tff" / "bin" / "python")).absolute()
PROGRAM = "import typer; from deploy.simulate.cli import simulate; typer.run(simulate)"
COMMAND = [sys.executable, "-c", PROGRAM]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not PYTHON.exists(), reason="TFF's environment is absent: make setup-parity"),
    pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="the watches' data are absent"),
]


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--report", str(directory / "report"), *arguments],
        cwd=ROOT,
        env=os.environ | {"COVEY_TFF_PYTHON": str(PYTHON), "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def simulated(directory: Path, *arguments: str) -> dict[str, Any]:
    directory.mkdir()
    process = start(directory, *arguments)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    result: dict[str, Any] = json.loads((directory / "report" / "result.json").read_text())
    return result


def left(directory: Path) -> list[str]:
    """Processes with this directory in their environment: TFF's executor has it nowhere else."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={directory}".encode() in place.read_bytes():
                found.append(place.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def gone(directory: Path, seconds: float = 20.0) -> list[str]:
    until = time.monotonic() + seconds
    while (found := left(directory)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "digits", "--cohort", "6"),
        ("--model", "watch", "--cohort", "5", "--server-optimizer", "fedavgm", "--server-lr", "0.3"),
    ],
)
def test_both_engines_train_the_same_model(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Whole epochs in batches, in one order; after the first round the ring's rounding is amplified."""
    common = (*arguments, "--rounds", "2", "--bits", "32", "--clip-norm", "1.0")
    ours = simulated(tmp_path / "ours", *common)
    theirs = simulated(tmp_path / "theirs", "--engine", "tff", *common)
    assert (ours["simulation"]["engine"], theirs["simulation"]["engine"]) == ("local", "tff")
    mine, other = ours["simulation"]["loss_per_round"], theirs["simulation"]["loss_per_round"]
    assert other[1] == pytest.approx(mine[1], abs=2e-5)
    assert other[2] == pytest.approx(mine[2], abs=5e-3)
    assert abs(mine[1] - mine[0]) > 1e-2, "it did train"
    same = ("devices", "rounds", "upload_bytes_per_round", "download_bytes_per_round", "privacy", "clip_norm")
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert "<strong>Simulated</strong> by TensorFlow Federated" in (
        tmp_path / "theirs" / "report" / "index.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "noise"),
    [("central", "0.4"), ("distributed", "0.4")],
)
def test_tff_adds_noise_that_costs_what_ours_does(mode: str, noise: str, tmp_path: Path) -> None:
    """Distributed, TFF's true multiplier is below the one asked for: rounding adds to its sensitivity."""
    arguments = ("--model", "digits", "--devices", "24", "--cohort", "24", "--rounds", "2")
    arguments += ("--privacy", mode, "--noise-multiplier", noise, "--bits", "18")
    ours = simulated(tmp_path / "ours", *arguments)
    theirs = simulated(tmp_path / "theirs", "--engine", "tff", *arguments)
    assert theirs["epsilon"] == pytest.approx(ours["epsilon"], rel=2e-2)
    if mode == "distributed":
        assert theirs["epsilon"] > ours["epsilon"]
    assert theirs["model_versions"][0] == ours["model_versions"][0]
    assert theirs["model_versions"][1] != ours["model_versions"][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "--engine", "tff", "--model", "watch", "--rounds", "1000")
    assert process.stdout is not None
    for line in process.stdout:
        if "simulated round 1 " in line:
            break
    assert any("worker_binary" in line for line in left(tmp_path)), "TFF's executor runs"
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert gone(tmp_path) == []
    files = [path.name for path in tmp_path.glob("covey-simulate-*")]
    assert files == [] or number == signal.SIGKILL


def test_what_goes_wrong_in_tff_is_told(tmp_path: Path) -> None:
    """TFF refuses to split so little noise between the clip norm's vote and the update."""
    process = start(
        tmp_path,
        *("--engine", "tff", "--model", "watch", "--rounds", "1", "--privacy", "central"),
        *("--noise-multiplier", "1.0", "--adaptive-clip", "0.5", "--cohort", "4"),
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "TFF failed: ValueError: clipped_count_stddev" in output
    assert gone(tmp_path) == []
