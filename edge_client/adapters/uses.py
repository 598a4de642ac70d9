"""Which version each process of a device uses, so that what kills it, or fails in it, is blamed on that one.

    uses/<process id>          the version in use, locked while the process lives
    uses/<process id>.crash    what it said when a fatal signal struck it (SIGSEGV, SIGABRT, SIGBUS, ...)
    uses/<sha256>.failed       a version that failed in `predict` or `personalise`, for `run` to take in

SIGKILL and a power cut leave no `.crash`: whoever is killed from outside blames nobody. Nothing here is
flushed, as a process that crashes takes none of it along.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from edge_client.adapters.files import open_private, private_directory, storage_errors
from edge_client.events import Fault
from protocol.fields import Schema

CRASHED = "crashed"
_SHA256_LENGTH = 64


class _Failure(Schema):
    code: str
    detail: str


@dataclass(frozen=True)
class FailedUse:
    """A version that failed while it was used, with the files that say so."""

    sha256: str
    fault: Fault
    files: tuple[Path, ...]


class VersionUses:
    """The notes of all processes of one device. One object a process; `armed` before a version is used."""

    def __init__(self, root: Path) -> None:
        """Takes a state directory."""
        self._directory = root / "uses"
        self._note: BinaryIO | None = None

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Has fatal signals of this process written down, while the block lasts."""
        pid = os.getpid()
        mine, crash = self._directory / str(pid), self._directory / f"{pid}.crash"
        with contextlib.ExitStack() as stack:
            try:
                private_directory(self._directory)
                note = os.fdopen(open_private(mine, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "r+b", buffering=0)
                stack.enter_context(note)
                fcntl.flock(note, fcntl.LOCK_EX)
                told = os.fdopen(open_private(crash, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")
                stack.enter_context(told)
            except OSError:
                # A full disk must not keep a device from predicting: it only blames nobody.
                yield
                return
            self._note = note
            faulthandler.enable(told, all_threads=False)
            try:
                yield
            finally:
                faulthandler.disable()
                self._note = None
                with contextlib.suppress(OSError):
                    crash.unlink()
                    mine.unlink()

    @contextlib.contextmanager
    def of(self, sha256: str) -> Iterator[None]:
        """Notes that the version with this digest is used, while the block lasts."""
        note = self._note
        if note is None:
            yield
            return
        with contextlib.suppress(OSError):
            os.pwrite(note.fileno(), sha256.encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(note.fileno(), 0)

    def failed(self, sha256: str, fault: Fault) -> None:
        """Leaves word that a version failed, for the process that may change what is served."""
        with contextlib.suppress(OSError):
            private_directory(self._directory)
            descriptor = open_private(
                self._directory / f"{sha256}.failed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(_Failure(code=fault.code, detail=fault.detail).model_dump_json().encode())

    def found(self) -> tuple[FailedUse, ...]:
        """What failed since it was last `forgotten`; notes of processes that ended otherwise are removed.

        Raises:
            StorageError: the directory cannot be read.
        """
        failures = []
        with storage_errors("reading what failed"):
            if not self._directory.is_dir():
                return ()
            for path in sorted(self._directory.iterdir()):
                found = None
                if path.suffix == ".failed":
                    found = _told(path)
                elif not path.suffix and _is_over(path):
                    found = _crash(path)
                if found is not None:
                    failures.append(found)
        return tuple(failures)

    def forget(self, failure: FailedUse) -> None:
        """Removes the notes of a failure that was taken in."""
        for path in failure.files:
            with contextlib.suppress(OSError):
                path.unlink()


def _told(path: Path) -> FailedUse | None:
    try:
        told = _Failure.model_validate_json(path.read_bytes())
    except (ValidationError, OSError):
        # Cut off by a full disk.
        path.unlink(missing_ok=True)
        return None
    return FailedUse(path.stem, Fault(told.code, told.detail), (path,))


def _crash(path: Path) -> FailedUse | None:
    told = path.with_suffix(".crash")
    sha256 = path.read_bytes()[:_SHA256_LENGTH].decode(errors="replace")
    text = told.read_text(errors="replace") if told.exists() else ""
    if not text or not sha256:
        told.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return None
    detail = text.splitlines()[0][:200]
    return FailedUse(sha256, Fault(CRASHED, detail), (told, path))


def _is_over(path: Path) -> bool:
    """Whether the process of a note has ended."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
