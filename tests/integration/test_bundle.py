"""The client bundle of Bookworm, made for real and run by an emulated aarch64 with Debian's Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from deploy.bundle.build import TARGETS, BundleError, Target, build_bundle
from edge_client import __version__
from tests.arm64_machine import MMDEBSTRAP, QEMU, machine

LIMIT = 20 * 10**6
"""Bytes of a compressed bundle with tflite-runtime."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(TARGETS["bookworm-arm64"], tmp_path_factory.mktemp("dist"))


@pytest.mark.arm64
@pytest.mark.skipif(not (QEMU and MMDEBSTRAP), reason="needs qemu-user-static and mmdebstrap")
def test_the_bundle_is_small_whole_and_runs_on_debian_arm64(bundle: Path, tmp_path: Path) -> None:
    assert bundle.name == f"covey-{__version__}-bookworm-arm64.tar.xz"
    assert bundle.stat().st_size <= LIMIT
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path, filter="data")
    description = json.loads((tmp_path / "bundle.json").read_text())
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == description["files"].keys() | {"bundle.json"}
    assert not [name for name in found if re.search(r"tensorflow/|fastapi|sqlalchemy|/tests/", name)]
    assert os.access(tmp_path / "bin" / "covey-edge", os.X_OK)

    emulated = machine().folder / "root"
    python = next((emulated / "usr/bin").glob("python3.*"))
    shown = subprocess.run(
        [str(QEMU), "-L", str(emulated), str(python), "-c", _TRY],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site"), "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout
    assert "aarch64 tflite-runtime 2.14.0" in shown


_TRY = """
import platform, subprocess, sys
from edge_client.commands import running
from edge_client.adapters import mqtt, tflite, worker
import edge_client.daemon
print(platform.machine(), running.runtime_name())
"""


def test_a_package_that_does_not_match_its_hash_is_refused(tmp_path: Path) -> None:
    class Tampered(Target):
        @property
        def requirements(self) -> Path:
            return tmp_path / "requirements.txt"

    (tmp_path / "requirements.txt").write_text(f"paho-mqtt==2.1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(BundleError, match=r"requirements\.txt"):
        build_bundle(Tampered("bookworm-arm64", "3.11", ""), tmp_path / "dist")
    assert not list((tmp_path / "dist").iterdir())
