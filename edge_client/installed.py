"""What is installed of the client itself, as one process of root leaves it and the client reads it. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

OUTCOME = "outcome"
"""Name of the file beside the versions."""
MAX_OUTCOME_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    """What became of an update.

    Attributes:
        version: that was to be installed; empty when it could not be told.
        assignment: digest of the assignment that asked for it, hexadecimal; empty without one.
        reason: why it was not taken; empty when it was.
    """

    version: str
    assignment: str
    reason: str = ""

    def to_text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Outcome | None:
        """Parses the content of the file; None when it is none."""
        try:
            found = json.loads(text)
            return cls(str(found["version"]), str(found["assignment"]), str(found["reason"]))
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Sight:
    """The client as it is installed on this device.

    Attributes:
        version: that runs.
        target: system of its bundle, as `bookworm-arm64`.
        good: the version that stood its trial last.
        previous: the good one before, which is still there.
        outcome: of the last update.
        waits: whether an update lies ready for the program of root, or is on trial.
    """

    version: str
    target: str
    good: str = ""
    previous: str = ""
    outcome: Outcome | None = None
    waits: bool = False
