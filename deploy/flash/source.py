"""Images as they are downloaded: plain, .xz, or .zip, read as a stream, with their checksum."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK = 4 * 2**20
"""Bytes that are read and written at once."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ImageError(RuntimeError):
    """An image cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Image:
    """An image file.

    Attributes:
        path: the file, as downloaded.
        size: bytes of the image within.
    """

    path: Path
    size: int

    @classmethod
    def open(cls, path: Path) -> Image:
        """Looks at a file without unpacking it.

        Raises:
            ImageError: it is no image that can be read.
        """
        try:
            if path.suffix == ".xz":
                return cls(path, _xz_size(path))
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    return cls(path, _member(archive).file_size)
            return cls(path, path.stat().st_size)
        except OSError as error:
            raise ImageError(f"cannot read {path}: {error.strerror}") from error
        except zipfile.BadZipFile as error:
            raise ImageError(f"{path} is no zip file: download it again") from error

    def blocks(self) -> Iterator[bytes]:
        """The image in blocks; all but the last have `BLOCK` bytes.

        Raises:
            ImageError: the file is damaged.
        """
        try:
            if self.path.suffix == ".xz":
                with lzma.open(self.path) as stream:
                    yield from _read(stream)
            elif self.path.suffix == ".zip":
                with zipfile.ZipFile(self.path) as archive, archive.open(_member(archive)) as member:
                    yield from _read(member)
            else:
                with self.path.open("rb") as file:
                    yield from _read(file)
        except (lzma.LZMAError, zipfile.BadZipFile, EOFError) as error:
            raise ImageError(f"{self.path} is damaged: download it again") from error

    def check(self, expected: str | None) -> str | None:
        """Compares the file's SHA-256 with the given one, else with the one in FILE.sha256 beside it.

        Returns:
            The checksum; None when there is nothing to compare with.

        Raises:
            ImageError: they differ, or what is given is no checksum.
        """
        beside = self.path.with_name(self.path.name + ".sha256")
        if expected is None and beside.is_file():
            expected = beside.read_text().split()[0] if beside.stat().st_size < 4096 else ""
        if expected is None:
            return None
        expected = expected.lower()
        if not _SHA256.fullmatch(expected):
            raise ImageError("a SHA-256 checksum has 64 hexadecimal digits")
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for block in _read(file):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ImageError(f"{self.path} has another checksum than it should: download it again")
        return expected


def _read(stream: IO[bytes]) -> Iterator[bytes]:
    while block := stream.read(BLOCK):
        yield block


def _member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    images = [member for member in archive.infolist() if member.filename.endswith(".img")]
    if len(images) != 1:
        raise ImageError(f"{archive.filename} holds {len(images)} images: unpack the one that you want")
    return images[0]


def _xz_size(path: Path) -> int:
    if not path.is_file():
        raise ImageError(f"there is no file {path}")
    if shutil.which("xz") is None:
        raise ImageError("the program xz is missing; on Debian: apt-get install xz-utils")
    done = subprocess.run(
        ["xz", "--robot", "--list", path], capture_output=True, text=True, check=False, timeout=60
    )
    totals = next((line.split("\t") for line in done.stdout.splitlines() if line.startswith("totals")), None)
    if done.returncode != 0 or totals is None:
        raise ImageError(f"{path} is damaged: download it again")
    return int(totals[4])
