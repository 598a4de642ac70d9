"""Files that survive a power cut: written aside, flushed, renamed, and the directory flushed, too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700


class StorageError(OSError):
    """The device's storage does not do what it is asked for."""


class StorageFull(StorageError):
    """No space is left, or the quota is reached."""


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turns the system's errors into typed ones that say what was being done."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (StorageFull if full else StorageError)(error.errno, f"{doing}: {error.strerror}") from error


def private_directory(path: Path) -> Path:
    """Makes a directory that only this user can enter; one that exists is closed to the others."""
    with storage_errors(f"making {path}"):
        path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        path.chmod(PRIVATE_DIRECTORY)
    return path


def sync_directory(path: Path) -> None:
    """Makes names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_private(path: Path, flags: int) -> int:
    """Opens a file that only this user can read; returns a descriptor."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)


def write_durably(path: Path, parts: Iterable[bytes]) -> tuple[str, int]:
    """Replaces a file as a whole: after a power cut it has its old content or its new one.

    Returns:
        The SHA-256 of the new content in hexadecimal, and its size.

    Raises:
        StorageError: the disk is full or fails; the old content is still there.
    """
    aside = path.with_name(f".{path.name}.new")
    digest, size = sha256(), 0
    try:
        with storage_errors(f"writing {path.name}"):
            descriptor = open_private(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    digest.update(part)
                    size += len(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    return digest.hexdigest(), size


def shred(path: Path) -> None:
    """Overwrites a file and removes it; on a card, wear levelling may keep a copy of what it held.

    Raises:
        StorageError: it cannot be.
    """
    with storage_errors(f"removing {path}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(os.fstat(descriptor).st_size))
            file.flush()
            os.fsync(descriptor)
        path.unlink()
        sync_directory(path.parent)


class Lock:
    """Holds a file for this process alone; the kernel lets go of it when the process ends in any way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Takes the lock; returns False when another process has it."""
        with storage_errors(f"opening {self._path}"):
            descriptor = open_private(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Lets go of the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
