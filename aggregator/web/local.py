"""How commands on the same machine find the running service: a file that only its owner may read."""

from __future__ import annotations

import getpass
import os
import secrets
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
        """What a service left in `STATE/api`; None when there is nothing to read."""
        try:
            return cls.model_validate_json((directory / FILE).read_bytes())
        except (OSError, ValidationError):
            return None


def new_local_token() -> tuple[str, str]:
    """Makes a token for the owner of the state directory; returns (token, name of that user)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid-{os.getuid()}"
    return PREFIX + secrets.token_hex(32), user
