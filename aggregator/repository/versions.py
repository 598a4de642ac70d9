"""The part of the repository that holds versions, and who has which of them."""

from __future__ import annotations

from typing import Protocol

from aggregator.records import Assigned, Pin, Rollout, Stage, Version


class VersionReader(Protocol):
    """What can be read of it; see `aggregator.repository`."""

    # --- versions
    def version(self, model: str, version: int) -> Version | None:
        """One version of a model."""
        ...

    def newest_version(self, model: str, *stages: Stage) -> Version | None:
        """The version with the highest number, in one of the stages (any when none is named)."""
        ...

    def newest_versions(self) -> tuple[Version, ...]:
        """The newest version of every model, by model."""
        ...

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        """All versions, of one model or of all, by model and number."""
        ...

    # --- who has which version
    def pins(self, model: str | None = None) -> tuple[Pin, ...]:
        """The pins of a model, or all; by model, kind and target."""
        ...

    def assigned(self, model: str, device_id: str = "") -> Assigned | None:
        """What the fleet, or one device, was last told to have."""
        ...

    def assigned_devices(self, model: str, *, of_its_own: bool = False) -> tuple[Assigned, ...]:
        """The devices that were ever told to have a version of their own, by id.

        Args:
            of_its_own: only those that still are to have one.
        """
        ...

    def rollout(self, rollout_id: str) -> Rollout | None:
        """One rollout."""
        ...

    def rollouts(self, *statuses: str) -> tuple[Rollout, ...]:
        """Rollouts in one of the statuses (all when none is named), oldest first."""
        ...


class VersionWriter(Protocol):
    """What can be changed; see `aggregator.repository`."""

    # --- versions
    def add_version(self, version: Version) -> None:
        """Adds a published version.

        Raises:
            Conflict: the model has this version, or this round has published one.
        """
        ...

    # --- who has which version
    def set_stage(self, model: str, version: int, stage: Stage) -> None:
        """Notes how far a version has come.

        Raises:
            NotFound: no such version.
        """
        ...

    def set_pin(self, pin: Pin) -> None:
        """Adds a pin, in place of one of the same target."""
        ...

    def drop_pin(self, model: str, kind: str, target: str) -> None:
        """Removes a pin.

        Raises:
            NotFound: there is none.
        """
        ...

    def assign(self, assigned: Assigned) -> None:
        """Records what the fleet, or one device, is told to have.

        Raises:
            Conflict: its sequence is not above the one before.
        """
        ...

    def add_rollout(self, rollout: Rollout) -> None:
        """Adds a rollout.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def update_rollout(self, rollout_id: str, status: str, progress: bytes) -> None:
        """Changes status and progress of a rollout.

        Raises:
            NotFound: no such rollout.
        """
        ...
