"""Builds a client bundle: pinned wheels for the device's system and Covey's own packages, as one tar.xz.

    covey-VERSION-TARGET.tar.xz
        bundle.json         version, target, Python, and the digest of every file
        site/               packages, as `PYTHONPATH` takes them
        bin/covey-edge      starts the client with the system's Python; covey-update changes it, and
                        covey-compile makes its bytecode when it is installed
        systemd/            the units that run it
        share/              setup.sh and install.sh, which put it in its place

Nothing is compiled and nothing runs: a bundle for arm64 is made on any machine, and twice the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_client import __version__

EPOCH = 1_735_689_600
"""2025-01-01: time stamp of every file in a bundle or an image: two builds have the same bytes."""
_PROJECT = Path(__file__).parents[2]
_UNITS = _PROJECT / "deploy" / "systemd"
_INSTALLERS = _PROJECT / "deploy" / "device"
_OWN = ("protocol", "models", "edge_client")
_EXPORTER_ONLY = ("layers", "architectures", "zoo", "datasets")
"""Folders of `models` that need TensorFlow or hold what a device gets from its fleet."""
_UNUSED = ("tests", "testing", "__pycache__", "include", "f2py", "distutils", "_pyinstaller")
_UNUSED_SUFFIXES = (".pyi", ".pyx", ".pxd", ".h", ".c", ".a")
_GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_26", "2_17")


class BundleError(RuntimeError):
    """A bundle cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Target:
    """A system that a bundle is for.

    Attributes:
        name: as in the file's name.
        python: the system's own Python, as "3.11".
        system: what people call it.
    """

    name: str
    python: str
    system: str

    @property
    def requirements(self) -> Path:
        """Its pinned packages, with hashes."""
        return Path(__file__).parent / f"requirements-{self.name}.txt"


TARGETS = {
    target.name: target
    for target in (
        Target("bookworm-arm64", "3.11", "Raspberry Pi OS or Debian 12 (Bookworm), 64-bit; tflite-runtime"),
        Target("trixie-arm64", "3.13", "Raspberry Pi OS or Debian 13 (Trixie), 64-bit; ai-edge-litert"),
    )
}

_LAUNCHER = """\
#!/bin/sh
# Starts the client with the system's Python and this bundle's packages, and none of the user's.
# Docstrings, and columns in tracebacks, are memory that a device can do without.
here=$(dirname "$(dirname "$(readlink -f "$0")")")
export PYTHONPATH="$here/site" PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONOPTIMIZE=2 PYTHONNODEBUGRANGES=1
exec python{python} -m {module} "$@"
"""
_PROGRAMS = {
    "covey-edge": "edge_client.main",
    "covey-update": "edge_client.updater",
    "covey-compile": "compileall",
}


def build_bundle(target: Target, folder: Path) -> Path:
    """Builds the bundle of one target.

    Args:
        target: the system.
        folder: where the file goes; made when it is not there.

    Returns:
        The file, named after version and target; one that was there is replaced.

    Raises:
        BundleError: a package cannot be had, or a program fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"covey-{__version__}-{target.name}.tar.xz"
    with tempfile.TemporaryDirectory(prefix="covey-bundle-") as temporary:
        tree = Path(temporary) / "tree"
        site = tree / "site"
        _install(target, site)
        _copy_own(site)
        _drop_unused(site)
        _strip(site)
        (tree / "bin").mkdir()
        for name, module in _PROGRAMS.items():
            launcher = tree / "bin" / name
            launcher.write_text(_LAUNCHER.format(python=target.python, module=module))
            launcher.chmod(0o755)
        shutil.copytree(_UNITS, tree / "systemd")
        shutil.copytree(_INSTALLERS, tree / "share")
        description = {
            "version": __version__,
            "target": target.name,
            "python": target.python,
            "files": {
                path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in _files(tree)
            },
        }
        (tree / "bundle.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            partial.write_bytes(_compress(tree))
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)
    return out


def _install(target: Target, site: Path) -> None:
    platforms = [f"--platform=manylinux_{version}_aarch64" for version in _GLIBC]
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-compile", "--no-deps", "--require-hashes", "--only-binary=:all:",
        "--implementation=cp", f"--python-version={target.python}", *platforms,
        "--platform=manylinux2014_aarch64", f"--target={site}", f"--requirement={target.requirements}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BundleError(f"pip cannot install {target.requirements.name}: {done.stderr.strip()[-400:]}")


def _copy_own(site: Path) -> None:
    for name in _OWN:
        shutil.copytree(_PROJECT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _EXPORTER_ONLY:
        shutil.rmtree(site / "models" / name, ignore_errors=True)


def _drop_unused(site: Path) -> None:
    for path in sorted(site.rglob("*"), reverse=True):
        if path.is_dir() and path.name in _UNUSED:
            shutil.rmtree(path)
        elif path.suffix in _UNUSED_SUFFIXES:
            path.unlink()
    shutil.rmtree(site / "bin", ignore_errors=True)


def _strip(site: Path) -> None:
    # Debug symbols are a quarter of the wheels; without the program the bundle is larger and as good.
    program = shutil.which("aarch64-linux-gnu-strip")
    libraries = [str(path) for path in _files(site) if ".so" in path.suffixes]
    if program is not None and libraries:
        subprocess.run([program, "--strip-unneeded", *libraries], check=False, capture_output=True)


def _compress(tree: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in _files(tree):
            entry = tarfile.TarInfo(path.relative_to(tree).as_posix())
            entry.size, entry.mtime = path.stat().st_size, EPOCH
            entry.mode = 0o755 if os.access(path, os.X_OK) and path.parent.name == "bin" else 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def _files(folder: Path) -> Iterator[Path]:
    return iter(sorted(path for path in folder.rglob("*") if path.is_file()))
