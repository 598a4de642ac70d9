"""Keeps the list of revoked certificates that the broker reads, and sees who still uses one. Pure.

A certificate may be revoked while its device stays in the fleet: another one took its place under its name.
The broker knows clients by name, so it has to be told twice: the list keeps the old certificate from
connecting, and then whoever is connected under that name is sent away once, to come back with the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from aggregator.records import IssuedCertificate

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
"""How long after the list could not be written it is tried again."""
SETTLE_SECONDS = 5.0
"""What a broker has to take up a new list: `broker/start` looks every two seconds."""

WriteList = Callable[[Sequence[IssuedCertificate]], bool]


class RevokedList:
    """Belongs to the main loop; what it knows follows from the database, and from the list on disk."""

    def __init__(self, write: WriteList) -> None:
        """Prepares it.

        Args:
            write: writes the list unless it says the same already; returns False when the CA's key is
                elsewhere.
        """
        self._write = write
        self._known: frozenset[str] | None = None
        self._look_at = float("-inf")
        self._leaving: dict[str, float] = {}

    def tick(
        self, revoked: Sequence[IssuedCertificate], members: frozenset[str], clock: float
    ) -> frozenset[str]:
        """Does what is due; returns the devices that are to be sent away once.

        Args:
            revoked: every revoked certificate.
            members: ids of those that may connect.
            clock: monotonic seconds.
        """
        serials = frozenset(each.serial for each in revoked)
        if serials != self._known and clock >= self._look_at:
            self._look_at = clock + AGAIN_SECONDS
            if self._written(revoked):
                known, self._known = self._known, serials
                self._look_at = float("-inf")
                if known is not None:
                    names = {each.device_id for each in revoked if each.serial not in known}
                    self._leaving |= dict.fromkeys(names & members, clock + SETTLE_SECONDS)
        due = frozenset(name for name, at in self._leaving.items() if clock >= at)
        self._leaving = {name: at for name, at in self._leaving.items() if name not in due}
        return due & members

    def _written(self, revoked: Sequence[IssuedCertificate]) -> bool:
        try:
            if self._write(revoked):
                return True
            logger.warning(
                "the broker's list of revoked certificates is behind: it needs the CA's key, which is kept "
                "elsewhere; run `covey aggregator broker` where it is"
            )
        except OSError as error:
            logger.error("the broker's list of revoked certificates cannot be written: %s", error)
        return False
