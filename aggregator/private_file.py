"""Files that nobody but their owner may read."""

from __future__ import annotations

import os
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Writes a new file that nobody else may read.

    Raises:
        FileExistsError: there is one of that name; it is as it was.
    """
    # The mode is given at creation: there is no moment at which others could open the file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_private(path: Path, data: bytes) -> None:
    """Writes a file that nobody else may read, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    write_private(temporary, data)
    temporary.replace(path)
