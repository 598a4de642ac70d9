"""Renews this device's certificate before it ends: asks, tries what it gets, and then goes over to it.

The old certificate stays until the broker has taken the new one, and the change waits until no round runs: a
round knows the certificate that it began with. The wall clock says when a certificate is due, and may
be wrong; the steady one says when to ask again, so that a wrong one makes no flood.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.adapters.credentials import Credentials
from edge_client.adapters.files import StorageError
from edge_client.adapters.renewal_files import RenewalFiles
from edge_client.adapters.tls import TlsFiles
from protocol.errors import BadSignature
from protocol.identity import key_id
from protocol.messages import RenewalAnswer, RenewalRequest
from protocol.renewal import Lifetime, ask

FIRST_WAIT_SECONDS = 60.0
DOUBLINGS = 8
SETTLED_SECONDS = 86_400.0
"""How long nothing is asked after an answer that left nothing to do."""
CLOCK_SECONDS = 86_400

_LOG = logging.getLogger("covey.edge")


class Trial(Enum):
    """What a broker says to a certificate."""

    TAKEN = "taken"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


class Try(Protocol):
    """Shows the broker a certificate, without speaking MQTT."""

    def __call__(self, files: TlsFiles) -> Trial:
        """Returns what the broker says; waits some seconds at most."""
        ...


@dataclass
class _Asked:
    """What is under way."""

    key: Ed25519PrivateKey | None = field(default=None, repr=False)
    granted: Credentials | None = None
    files: TlsFiles | None = None


class Renewer:
    """Belongs to the daemon's loop."""

    def __init__(
        self, files: RenewalFiles, credentials: Credentials, try_certificate: Try, chance: Callable[[], float]
    ) -> None:
        """Prepares it.

        Args:
            files: where the new certificate waits.
            credentials: the present ones.
            try_certificate: shows the broker the new one.
            chance: uniform in [0, 1), to spread devices.
        """
        self._files, self._try, self._chance = files, try_certificate, chance
        self._credentials = credentials
        self._asked = _Asked()
        self._ask_at = float("-inf")
        self._try_at = float("-inf")
        self._attempt = 0

    def due(self, unix: float, steady: float) -> RenewalRequest | None:
        """The request that is to be sent now, if one is.

        Args:
            unix: the wall clock.
            steady: a clock that nobody sets.
        """
        if self._asked.granted is not None:
            return None
        wish = self._files.wished()
        bundle = self._credentials.bundle
        wanted = wish is not None and self._attempt == 0
        late = Lifetime.of(bundle.certificate).is_due(unix) or wish is not None
        if not wanted and (not late or steady < self._ask_at):
            return None
        try:
            new = self._files.key(new=bool(wish))
        except StorageError as error:
            _LOG.error("storage-error reason=%r", str(error))
            return None
        self._wait(steady, FIRST_WAIT_SECONDS * 2.0 ** min(self._attempt, DOUBLINGS))
        self._attempt += 1
        self._asked = _Asked(key=new or self._credentials.identity)
        _LOG.info("renewal-asked new_key=%s attempt=%d", new is not None, self._attempt)
        return ask(
            bundle.fleet,
            bundle.device_id,
            bundle.certificate,
            self._credentials.identity,
            new or self._credentials.identity,
        )

    def take(self, answer: RenewalAnswer, unix: float, steady: float) -> None:
        """Takes in what the fleet's service answers."""
        key, bundle = self._asked.key, self._credentials.bundle
        if key is None or self._asked.granted is not None:
            return
        if abs(answer.time - unix) > CLOCK_SECONDS:
            _LOG.warning("clock-off seconds=%+.0f", unix - answer.time)
        self._attempt = 0
        if answer.certificate is None:
            self._wait(steady, max(float(answer.again), FIRST_WAIT_SECONDS))
            self._conclude(f"not renewed, {answer.code}: {answer.detail}")
            return
        if answer.certificate == bundle.certificate:
            self._wait(steady, SETTLED_SECONDS)
            self._conclude("not renewed: the service finds the certificate young enough")
            return
        fresh = bundle.model_copy(update={"certificate": answer.certificate})
        try:
            # By the service's clock, which issued it: this one may be wrong, and a broker checks it anyway.
            certificate = fresh.verify(now=answer.time)
            if key_id(certificate.public_key) != key_id(key.public_key()):
                raise BadSignature("the new certificate is for another key")
            self._asked.files = self._files.grant(fresh)
        except (BadSignature, StorageError) as error:
            self._wait(steady, SETTLED_SECONDS)
            self._conclude(f"not renewed: {error}")
            return
        self._asked.granted = Credentials(key, fresh)
        self._try_at = float("-inf")

    def change(self, steady: float) -> Credentials | None:
        """Tries a new certificate that waits, and goes over to it; to be called while no round runs.

        Returns:
            What this device has from now on; None when nothing changed.
        """
        granted, files = self._asked.granted, self._asked.files
        if granted is None or files is None or steady < self._try_at:
            return None
        trial = self._try(files)
        if trial is Trial.UNREACHABLE:
            self._try_at = steady + FIRST_WAIT_SECONDS
            return None
        self._wait(steady, SETTLED_SECONDS)
        if trial is Trial.REFUSED:
            self._asked = _Asked()
            self._conclude("not renewed: the broker refuses the new certificate, the present one stays")
            return None
        try:
            self._files.adopt()
        except StorageError as error:
            self._try_at = steady + FIRST_WAIT_SECONDS
            _LOG.error("storage-error reason=%r", str(error))
            return None
        self._asked, self._credentials = _Asked(), granted
        self._conclude("renewed")
        return granted

    def _wait(self, steady: float, seconds: float) -> None:
        self._ask_at = steady + seconds * (0.75 + 0.5 * self._chance())

    def _conclude(self, outcome: str) -> None:
        level = logging.INFO if outcome == "renewed" else logging.WARNING
        _LOG.log(level, "renewal-over outcome=%r", outcome)
        try:
            self._files.conclude(outcome)
        except StorageError as error:
            _LOG.error("storage-error reason=%r", str(error))
