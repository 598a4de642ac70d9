"""How a device changes its client: tried first, kept when it stands, else the one before comes back. A core.

    install -> self-test -> trial -> current -> healthy?  -> good
                  |                             |
                  +--------- refused <----------+  (current goes back to good)

Whatever happens in between, `current` names a whole version, and `settle` ends what was begun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from protocol.client_release import ClientRelease, version_number

ATTEMPTS = 2
"""So often a version is started for its trial: one power cut is forgiven, and no second one."""

Link = Literal["current", "good", "previous"]


class UpdateRefused(Exception):
    """A client is not installed; the message says why."""


class TrialNote(Protocol):
    """A version that has to prove itself."""

    @property
    def version(self) -> str:
        """Its name."""

    @property
    def attempts(self) -> int:
        """How often it was started for that."""


class Store(Protocol):
    """Installed versions; see `edge_client.adapters.versions`."""

    def path(self, version: str) -> Path:
        """Where a version is."""

    def linked(self, link: Link) -> str | None:
        """The version that a link names."""

    def point(self, link: Link, version: str) -> None:
        """Lets a link name another version."""

    def install(self, version: str, bundle: Path) -> None:
        """Unpacks a bundle as a version."""

    def trial(self) -> TrialNote | None:
        """What is being tried."""

    def begin_trial(self, version: str, attempts: int) -> None:
        """Notes what is being tried."""

    def end_trial(self) -> None:
        """Notes that nothing is."""

    def refuse(self, version: str, reason: str) -> None:
        """Notes that a version failed."""

    def refused(self, version: str) -> bool:
        """Whether it did."""

    def prune(self) -> None:
        """Removes what nothing names."""


class Service(Protocol):
    """The client as a service of the system."""

    def self_test(self, version: Path) -> str | None:
        """Tries a version that is not in use; returns why it fails, or None."""

    def start(self, version: Path) -> None:
        """Starts the current version with the units of its own bundle."""

    def healthy(self) -> bool:
        """Watches the service for a while; returns whether it stays up."""


def update(
    store: Store, service: Service, release: ClientRelease, bundle: Path, *, back: bool = False
) -> str:
    """Installs a release, unless it is there, and puts it on trial.

    Args:
        store: the installed versions.
        service: the client's service.
        release: what the operator signed.
        bundle: the file, whose digest is the release's; not looked at when the version is installed.
        back: whether the operator wants this device to have an older version than it has.

    Returns:
        The version that runs now.

    Raises:
        UpdateRefused: it is not newer where it should be, failed before, or fails its self-test.
        UnusableBundle: the bundle is damaged.
    """
    settle(store, service)
    good = store.linked("good")
    if good is not None and not back and release.number <= version_number(good):
        raise UpdateRefused(f"{release.version} is not newer than {good}")
    if store.refused(release.version):
        raise UpdateRefused(f"{release.version} failed on this device before")
    store.install(release.version, bundle)
    reason = service.self_test(store.path(release.version))
    if reason is not None:
        store.refuse(release.version, reason)
        store.prune()
        raise UpdateRefused(f"{release.version} fails its self-test: {reason}")
    store.begin_trial(release.version, 0)
    return settle(store, service)


def settle(store: Store, service: Service) -> str:
    """Ends a trial that was begun, in this run or before a power cut; without one, tidies up.

    Returns:
        The version that runs now; "" when none was ever good.
    """
    trial, good = store.trial(), store.linked("good")
    if trial is None:
        if good is not None and store.linked("current") != good:
            store.point("current", good)
            service.start(store.path(good))
        store.prune()
        return good or ""
    if good == trial.version:  # cut between the verdict and its note
        store.end_trial()
        return settle(store, service)
    if trial.attempts < ATTEMPTS:
        store.begin_trial(trial.version, trial.attempts + 1)
        store.point("current", trial.version)
        service.start(store.path(trial.version))
        if service.healthy():
            if good is not None:
                store.point("previous", good)
            store.point("good", trial.version)
            store.end_trial()
            return settle(store, service)
    store.refuse(trial.version, "it did not stay up")
    if good is not None:
        store.point("current", good)
    store.end_trial()
    if good is not None:
        service.start(store.path(good))
    store.prune()
    return good or ""
