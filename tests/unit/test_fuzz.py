"""A few seconds of fuzzing in every run, and that the fuzzer would find something; `make fuzz` goes on for
longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="has no wheel for this Python")


def fuzz(directory: Path, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    # A program keeps the peak memory of the process that it replaced, here of pytest, and libFuzzer would
    # take it for its own: so a shell starts it, and stays, as there is an `exit` to come.
    command = [sys.executable, "-m", "tests.fuzz_wire", "--target", target, "--", *options]
    return subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command],
        cwd=directory,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("frames", 4000),
        ("documents", 4000),
        ("keys", 4000),
        ("enrolments", 4000),
        ("server", 600),
        ("client", 300),
    ],
)
def test_whatever_comes_only_typed_errors_come_of_it(tmp_path: Path, target: str, runs: int) -> None:
    done = fuzz(tmp_path, target, f"-runs={runs}", "-seed=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"stat::number_of_executed_units: {runs}" in done.stderr


def test_the_fuzzer_finds_a_defect(tmp_path: Path) -> None:
    (tmp_path / "found").write_bytes(b"\x00ab")
    done = fuzz(tmp_path, "planted", "found")
    assert done.returncode != 0
    assert "a planted defect" in done.stderr + done.stdout
