"""`covey demo`, as a newcomer runs it: real broker, real processes, real data, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

COVEY = Path(sys.executable).parent / "covey"


def demo(directory: Path, *arguments: str) -> dict[str, Any]:
    report = directory / "report"
    finished = subprocess.run(
        [COVEY, "demo", "--report", report, *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env=os.environ | {"TMPDIR": str(directory)},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (report / "index.html").stat().st_size > 50_000
    return json.loads((report / "result.json").read_text())  # type: ignore[no-any-return]


def children_in(directory: Path) -> list[str]:
    """Command lines of processes that name this directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line and "covey" in line:
            found.append(line)
    return found


@pytest.mark.timeout(900)
def test_federated_beats_each_device_alone_on_every_held_out_person(tmp_path: Path) -> None:
    result = demo(tmp_path, "--folds", "0,3,6", "--rounds", "8", "--seed", "1")
    assert {person["person"] for person in result["people"]} == {"person-01", "person-04", "person-07"}
    for person in result["people"]:
        assert person["federated"] > person["local"] + 0.05, person
    assert result["federated_accuracy"] > 0.7
    assert abs(result["device_predictions_right"] - result["federated_accuracy"]) < 0.02
    assert result["rounds"] == 8
    assert result["dropouts_survived"] >= 6, "two rounds of each fold, with at least one real dropout each"
    assert all(dropout["returned_round"] for dropout in result["dropouts"])
    assert result["epsilon"] > 0
    assert result["delta"] == 1e-5
    assert 1_000 < result["upload_bytes_per_round"] < 40_000
    assert result["device_peak_rss_bytes"] <= 70 * 10**6
    assert len(result["accuracy_per_round"]) == 9
    assert result["wall_seconds"] > 0
    assert [version["version"] for version in result["model_versions"]] == list(range(1, 10))
    assert not children_in(tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["report"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["none", "central"])
def test_other_privacy_modes_on_the_other_data_set(tmp_path: Path, mode: str) -> None:
    options = ("--dataset", "digits", "--devices", "6", "--rounds", "3", "--drop", "0")
    result = demo(tmp_path, *options, "--privacy", mode)
    assert result["devices"] == 6
    assert result["federated_accuracy"] > 0.5
    assert (result["epsilon"] is None) == (mode == "none")
    assert result["dropouts_survived"] == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_mid_round_it_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [COVEY, "demo", "--report", tmp_path / "report"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1"):
            break
    assert children_in(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode in (130, 143, -signal.SIGTERM, -signal.SIGKILL)
    deadline = time.monotonic() + 120
    while children_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not children_in(tmp_path)
    if number is not signal.SIGKILL:  # nobody is left to clean up after SIGKILL
        assert not any(tmp_path.iterdir())
    assert tempfile.gettempdir()
