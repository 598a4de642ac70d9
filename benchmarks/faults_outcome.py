"""What one kill of the fault matrix led to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One case.

    Attributes:
        phase: the boundary, and its side.
        outcome: of the round that was hit, when the next one completed as well; or of the rollout.
        lost_versions: for a rollout, devices and steps that are not as they would be without the kill.
    """

    phase: str
    victim: str
    outcome: str
    lost_uploads: int
    lost_versions: int
    lost_ledger_entries: int

    @property
    def lossless(self) -> bool:
        """Whether the round ended cleanly and nothing is missing."""
        clean = self.outcome in ("completed", "rolled-back") or self.outcome.startswith("aborted")
        return clean and not (self.lost_uploads or self.lost_versions or self.lost_ledger_entries)
