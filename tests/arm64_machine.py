"""An aarch64 Debian with the device's packages, as a folder: made in seconds, and kept by what is in it.

Nothing in it is ever installed or booted. Debian's packages and Python's wheels are unpacked side by side,
and one program at a time runs in qemu's user mode.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

QEMU, MMDEBSTRAP = shutil.which("qemu-aarch64-static"), shutil.which("mmdebstrap")
CACHE = Path(__file__).parents[1] / ".cache" / "arm64"
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
# In the versions of this environment: the runtimes are compared, not numpy's releases.
WHEELS = ("cryptography", "numpy", "pydantic", "pynacl", "tflite-runtime")
# What Debian 12's glibc takes, newest first.
PLATFORMS = ("manylinux_2_34_aarch64", "manylinux_2_28_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class Arm64Machine:
    """The folder: `root` is Debian's file system, `site` holds the unpacked wheels."""

    folder: Path

    def run(self, *arguments: str | Path, seconds: float = 200.0) -> str:
        """Run Python with these arguments in this repository; returns what it printed.

        Raises:
            subprocess.CalledProcessError: it failed.
            subprocess.TimeoutExpired: it took longer.
        """
        assert QEMU is not None
        root, repository = self.folder / "root", Path(__file__).parents[1]
        python = next((root / "usr" / "bin").glob("python3.*"))
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, (repository, self.folder / "site"))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [QEMU, "-L", root, python, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=True,
        )
        return done.stdout


def machine() -> Arm64Machine:
    """The folder for the present list of packages; made if it is not there, as a whole or not at all."""
    wheels = [f"{name}=={version(name)}" for name in WHEELS]
    suite = _release()["VERSION_CODENAME"]
    key = hashlib.sha256(repr((suite, DEBIAN, wheels, PLATFORMS)).encode()).hexdigest()[:16]
    folder = CACHE / key
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as made:
            _extract_debian(Path(made) / "root", suite)
            _unpack_wheels(Path(made) / "site", wheels)
            (Path(made) / "whole").mkdir()
            for part in ("root", "site"):
                (Path(made) / part).rename(Path(made) / "whole" / part)
            (Path(made) / "whole").rename(folder)
    return Arm64Machine(folder)


def _release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _extract_debian(root: Path, suite: str) -> None:
    """Debian comes from where this machine gets its own packages."""
    assert MMDEBSTRAP is not None
    line = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", line, "Created-By: Packages"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    own = sorted({line for line in listed if line.split()[2].startswith(suite)})
    subprocess.run(
        [
            MMDEBSTRAP,
            "--quiet",
            "--variant=extract",
            "--arch=arm64",
            # Nothing of it is run while it is made.
            "--skip=check/qemu",
            f"--include={','.join(DEBIAN)}",
            suite,
            root,
            "-",
        ],
        input="\n".join(own),
        text=True,
        check=True,
        timeout=200,
    )


def _unpack_wheels(site: Path, wheels: list[str]) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        platforms = [f"--platform={name}" for name in PLATFORMS]
        target = ["--python-version=3.11", "--implementation=cp", *platforms, "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", downloads, *target, *wheels]
        subprocess.run(command, check=True, timeout=200)
        for wheel in Path(downloads).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
