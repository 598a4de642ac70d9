"""How commands on the same machine find the running service: a file that only its owner may read.

The service holds a lock of the kernel on it, which ends with the process, however that ends: the file that a
killed service leaves leads nobody to a port that is somebody else's by now.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = "local.json"
PREFIX = "covey_local_"


class LocalEndpoint(BaseModel):
    """Where the running service is, for those who can read the state directory."""

    model_config = ConfigDict(frozen=True)

    url: str
    token: Annotated[str, Field(repr=False)]

    @classmethod
    def read(cls, directory: Path) -> LocalEndpoint | None:
        """What the service that runs now says in `STATE/api`; None when none does."""
        try:
            with (directory / FILE).open("rb") as file:
                return cls.model_validate_json(file.read()) if _locked(file.fileno()) else None
        except (OSError, ValidationError):
            return None

    @contextlib.contextmanager
    def shown(self, directory: Path) -> Iterator[None]:
        """Lets commands find it in `STATE/api`, while the block lasts and this process lives."""
        path = directory / FILE
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        # Locked before it has its name: whoever finds it finds it locked.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(self.model_dump_json().encode())
            file.flush()
            temporary.replace(path)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def new_local_token() -> tuple[str, str]:
    """Makes a token for the owner of the state directory; returns (token, name of that user)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid-{os.getuid()}"
    return PREFIX + secrets.token_hex(32), user
