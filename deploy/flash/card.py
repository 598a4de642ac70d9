"""Writes an image, and reads it back past the page cache: what is compared is what the card holds."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.flash.source import BLOCK
from deploy.flash.targets import LSBLK, Disk, RefusedTarget, check_target, read_disks


class WriteError(RuntimeError):
    """An image did not get onto a card; the message says what to do."""


def find_target(device: Path, needed: int, *, system_drives: bool) -> Disk:
    """The disk at this path, if it may be overwritten.

    Raises:
        RefusedTarget: it may not.
    """
    try:
        done = subprocess.run(LSBLK, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise RefusedTarget("lsblk does not run, so nothing is known of the disks") from error
    return check_target(read_disks(done.stdout), str(device.resolve()), needed, system_drives=system_drives)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Opens a disk for writing, alone: fails when anybody has it mounted, and holds others off meanwhile.

    Raises:
        WriteError: it cannot be had.
    """
    device = path.is_block_device()
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if device else os.O_CREAT | os.O_TRUNC)
    try:
        descriptor = os.open(path, flags, 0o600)
    except PermissionError as error:
        raise WriteError(f"{path} cannot be written by you: run this as root (sudo)") from error
    except OSError as error:
        raise WriteError(f"{path} cannot be opened alone: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_image(
    descriptor: int, blocks: Iterable[bytes], progress: Callable[[int], None] = lambda _: None
) -> tuple[int, str]:
    """Writes blocks from the start, durably; holes of a regular file stay holes.

    Args:
        descriptor: from `opened`.
        blocks: the image.
        progress: is told how many bytes were written.

    Returns:
        Bytes and SHA-256 of the image.

    Raises:
        WriteError: the card failed.
    """
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    digest, size = hashlib.sha256(), 0
    try:
        for block in blocks:
            digest.update(block)
            if not (regular and block.count(0) == len(block)):
                view = memoryview(block)
                while view:
                    written = os.pwrite(descriptor, view, size + len(block) - len(view))
                    view = view[written:]
            size += len(block)
            progress(len(block))
        if regular:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    except OSError as error:
        raise WriteError(f"writing failed after {size / 1e6:.0f} MB: {error.strerror}") from error
    return size, digest.hexdigest()


def verify_image(
    descriptor: int, size: int, expected: str, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Reads the image back from the card itself, and compares.

    Args:
        descriptor: what was written, after fsync.
        size: bytes.
        expected: SHA-256 of the image.
        progress: is told how many bytes were read.

    Raises:
        WriteError: the card holds something else, or cannot be read.
    """
    # Clean pages are dropped, so that the reads below reach the card; without this nothing is verified.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    digest, offset = hashlib.sha256(), 0
    try:
        while offset < size:
            block = os.pread(descriptor, min(BLOCK, size - offset), offset)
            if not block:
                break
            digest.update(block)
            offset += len(block)
            progress(len(block))
    except OSError as error:
        raise WriteError(f"reading back failed after {offset / 1e6:.0f} MB: {error.strerror}") from error
    if digest.hexdigest() != expected:
        raise WriteError("the card does not hold what was written: try again, or take another card")
