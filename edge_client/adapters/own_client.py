"""The client as it is installed here, and where an update is laid ready for root's program."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from edge_client.adapters.blobs import Blobs
from edge_client.adapters.files import private_directory, storage_errors, sync_directory, write_durably
from edge_client.installed import (
    ASSIGNMENTS,
    BUNDLE,
    MAX_OUTCOME_BYTES,
    OUTCOME,
    READY,
    RELEASE,
    Outcome,
    Sight,
)
from edge_client.outputs import HandOver
from protocol.client_release import version_number

UPDATES = "updates"


class OwnClient:
    """The bundle that this process runs from, and the folder of updates in the client's state."""

    def __init__(self, bundle: Path, state: Path) -> None:
        """Takes the bundle's folder, /opt/covey/versions/VERSION, and the client's state."""
        self._bundle = bundle
        self._folder = bundle.parent.parent
        self._inbox = state / UPDATES

    @classmethod
    def here(cls, state: Path) -> OwnClient | None:
        """That of this process; None when it was installed otherwise: nobody could change it."""
        bundle = Path(__file__).resolve().parents[3]
        found = cls(bundle, state)
        return found if bundle.parent.name == "versions" and found.look() is not None else None

    def look(self) -> Sight | None:
        """What is installed; None when it cannot be told."""
        try:
            described = json.loads((self._bundle / "bundle.json").read_bytes())
            version, target = str(described["version"]), str(described["target"])
            version_number(version)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Sight(
            version=version,
            target=target,
            good=self._linked("good"),
            previous=self._linked("previous"),
            outcome=self._outcome(),
            waits=(self._inbox / READY).exists() or (self._folder / "trial").exists(),
        )

    def hand_over(self, blobs: Blobs, update: HandOver) -> None:
        """Lays an update ready; "ready" comes last, when everything else is durable.

        Raises:
            StorageError: the disk refuses; nothing lies ready.
        """
        private_directory(self._inbox)
        with storage_errors("laying an update ready"):
            (self._inbox / READY).unlink(missing_ok=True)
            bundle = self._inbox / BUNDLE
            if update.blob is None:
                bundle.unlink(missing_ok=True)
            else:
                # Another name of the same file: a card is written once.
                aside = self._inbox / f".{BUNDLE}.new"
                aside.unlink(missing_ok=True)
                os.link(blobs.path(update.blob), aside)
                aside.replace(bundle)
            write_durably(self._inbox / RELEASE, [update.release])
            write_durably(self._inbox / ASSIGNMENTS, [update.assignments])
            sync_directory(self._inbox)
            write_durably(self._inbox / READY, [])

    def tidy(self) -> None:
        """Deletes the bundle of an update that is over."""
        with contextlib.suppress(OSError):
            (self._inbox / BUNDLE).unlink(missing_ok=True)

    def _linked(self, link: str) -> str:
        path = self._folder / link
        try:
            name = path.readlink().name if path.is_dir() else ""
            version_number(name)
        except (OSError, ValueError):
            return ""
        return name

    def _outcome(self) -> Outcome | None:
        try:
            with (self._folder / OUTCOME).open("rb") as file:
                return Outcome.from_text(file.read(MAX_OUTCOME_BYTES).decode())
        except (OSError, UnicodeDecodeError):
            return None
