"""Where `covey login` keeps what it was told: one service, readable by its user only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class UnusableProfile(Exception):
    """The profile is damaged or readable by others; the message says what to do."""


class Profile(BaseModel):
    """A service, and who we are there.

    Attributes:
        ca: PEM of who signed its certificate; None trusts the system's list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    token: Annotated[str, Field(repr=False)]
    ca: str | None = None


def profile_file() -> Path:
    """Its place: `covey/profile.json` under the user's configuration (XDG_CONFIG_HOME)."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "covey" / "profile.json"


def load() -> Profile | None:
    """The profile; None when nobody has logged in.

    Raises:
        UnusableProfile: it says what to do.
    """
    path = profile_file()
    try:
        if path.stat().st_mode & 0o077:
            raise UnusableProfile(f"{path} can be read by others: run `chmod 600 {path}`")
        return Profile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UnusableProfile(f"{path} cannot be used: run `covey login` again") from error


def forget() -> bool:
    """Removes the profile; returns whether there was one."""
    path = profile_file()
    there = path.exists()
    path.unlink(missing_ok=True)
    return there
