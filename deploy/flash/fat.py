"""The boot partition: inside an image or on a card by mtools, or mounted as a folder."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from deploy.programs import missing_programs

_FAT_TYPES = frozenset({"1", "4", "6", "b", "c", "e", "ef", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"})
"""Of partitions, in an MBR and in a GPT."""


class BootPartitionError(RuntimeError):
    """A boot partition cannot be read or written; the message says what to do."""


class BootPartition(Protocol):
    """Where files for the first boot go."""

    def names(self) -> set[str]:
        """The names at its top."""

    def read(self, name: str) -> bytes:
        """A file at its top; empty when there is none."""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files by their path, durably; those that are there are replaced."""


class FatPartition:
    """The first FAT partition of an image or disk; nothing is mounted."""

    def __init__(self, image: Path) -> None:
        """Finds it.

        Raises:
            BootPartitionError: there is none, or a program is missing.
        """
        programs = {"sfdisk": "fdisk", "mcopy": "mtools"}
        if missing := missing_programs(programs):
            raise BootPartitionError(missing)
        table = json.loads(_run("sfdisk", "--json", str(image)))["partitiontable"]
        start = next((p["start"] for p in table["partitions"] if p["type"] in _FAT_TYPES), None)
        if start is None:
            raise BootPartitionError(f"{image} has no FAT partition, where a first boot looks for its files")
        self._image = image
        self._drive = f"{image}@@{start * int(table.get('sectorsize', 512))}"

    def names(self) -> set[str]:
        """The names at its top."""
        listing = _run("mdir", "-b", "-i", self._drive, "::/").decode(errors="replace")
        return {line.removeprefix("::/").rstrip("/") for line in listing.splitlines()}

    def read(self, name: str) -> bytes:
        """A file at its top; empty when there is none."""
        if name.lower() not in {found.lower() for found in self.names()}:
            return b""
        return _run("mtype", "-i", self._drive, f"::/{name}")

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files by their path, durably; those that are there are replaced."""
        with tempfile.TemporaryDirectory(prefix="covey-boot-") as folder:
            _stage(Path(folder), files)
            top = sorted(str(path) for path in Path(folder).iterdir())
            _run("mcopy", "-s", "-o", "-Q", "-i", self._drive, *top, "::/")
        _flush(self._image)
        for path, content in files.items():
            if _run("mtype", "-i", self._drive, f"::/{path}") != content:
                raise BootPartitionError(
                    f"the card does not hold {path} as it was written: take another card"
                )


class BootFolder:
    """A boot partition that is mounted as a folder, as macOS and Windows do by themselves."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder that exists."""
        self._folder = folder

    def names(self) -> set[str]:
        """The names at its top."""
        return {path.name for path in self._folder.iterdir()}

    def read(self, name: str) -> bytes:
        """A file at its top; empty when there is none."""
        path = self._folder / name
        return path.read_bytes() if path.is_file() else b""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files by their path, durably; those that are there are replaced."""
        try:
            _stage(self._folder, files)
            for path in files:
                _flush(self._folder / path)
        except OSError as error:
            raise BootPartitionError(f"cannot write {error.filename}: {error.strerror}") from error


def _stage(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Private while it lies on this machine: a ticket and a wireless key are among them.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _run(*command: str) -> bytes:
    # Some images say another size than their partition has; mtools would refuse them.
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=300)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()[-300:]
        raise BootPartitionError(f"{command[0]} failed: {reason}")
    return done.stdout
