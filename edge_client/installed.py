"""What the client and root's program tell each other: an update that lies ready, and what became of it. Pure.

/var/lib/covey/updates/release.json      the signed release
/var/lib/covey/updates/assignments.json  the signed assignments that ask for it, the fleet's first
/var/lib/covey/updates/bundle.tar.xz     its bundle for this system, unless that version is installed
/var/lib/covey/updates/ready             empty, and written last: it starts root's program
/opt/covey/outcome                       what became of the last update
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from protocol.version_assignment import VersionAssignment

BUNDLE, RELEASE, ASSIGNMENTS, READY = "bundle.tar.xz", "release.json", "assignments.json", "ready"
OUTCOME = "outcome"
Audience = Literal["fleet", "own"]
AUDIENCES: tuple[Audience, ...] = ("fleet", "own")
MAX_REASON = 300
MAX_OUTCOME_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    """What became of an update.

    Attributes:
        version: that was to be installed; empty when it could not be told.
        asked: SHA-256 of the assignments that asked for it, as a file; empty without any.
        reason: why it was not taken; empty when it was.
    """

    version: str
    asked: str
    reason: str = ""

    def to_text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Outcome | None:
        """Parses the content of the file; None when it is none."""
        try:
            found = json.loads(text)
            return cls(str(found["version"]), str(found["asked"]), str(found["reason"]))
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


def audience(assignment: VersionAssignment) -> Audience:
    """Whom an assignment is for."""
    return "fleet" if assignment.device is None else "own"


def wanted(assigned: Mapping[Audience, VersionAssignment]) -> VersionAssignment | None:
    """The assignment that says which version this device is to have: its own, while that names one."""
    own = assigned.get("own")
    return own if own is not None and own.version is not None else assigned.get("fleet")


def may_go_back(assigned: Mapping[Audience, VersionAssignment]) -> bool:
    """Whether what was said last lets this device have an older version than it has.

    An assignment of its own that is taken away leads back to the fleet's, which was signed long before.
    """
    latest = max(assigned.values(), key=lambda each: each.sequence, default=None)
    return latest is not None and latest.rollback
