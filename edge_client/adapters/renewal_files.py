"""A new certificate on its way to becoming this device's, as files of `STATE/renewal`.

wanted           the owner's wish to renew now; its text says whether with a new key
identity.pem     the new key, if there is one
enrolment.json   the bundle with the new certificate
tried            the broker takes it: from here on it is this device's, whatever happens
outcome          what became of the last attempt, for `covey-edge renew`

The old key and certificate stay as they are until `tried` is durable. What follows may be done any number of
times: a power cut in the middle is made good by doing it again.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_client.adapters.credentials import CA, CERTIFICATE, ENROLMENT, KEY, REQUEST, load_private_key
from edge_client.adapters.files import private_directory, storage_errors, sync_directory, write_durably
from edge_client.adapters.tls import TlsFiles
from protocol.enrolment import EnrolmentBundle
from protocol.identity import create_request

DIRECTORY = "renewal"
_WANTED, _TRIED, _OUTCOME = "wanted", "tried", "outcome"
_CERTIFICATE = "certificate.pem"


class RenewalFiles:
    """Those of one state directory."""

    def __init__(self, state: Path) -> None:
        """Names them; nothing is written."""
        self._state, self._directory = state, state / DIRECTORY

    def wish(self, *, new_key: bool) -> None:
        """Leaves the owner's wish for the client that runs.

        Raises:
            StorageError: it cannot be written.
        """
        private_directory(self._directory)
        self._remove(_OUTCOME)
        write_durably(self._directory / _WANTED, [b"new-key" if new_key else b"same-key"])

    def wished(self) -> bool | None:
        """Whether the owner wishes for a new key; None without a wish."""
        try:
            return (self._directory / _WANTED).read_bytes() == b"new-key"
        except OSError:
            return None

    def outcome(self) -> str | None:
        """What became of the wish; None while it is open."""
        try:
            return (self._directory / _OUTCOME).read_text()
        except OSError:
            return None

    def conclude(self, outcome: str) -> None:
        """Says what became of the attempt; the wish is over.

        Raises:
            StorageError: it cannot be written.
        """
        if (self._directory / _WANTED).exists():
            write_durably(self._directory / _OUTCOME, [outcome.encode()])
            self._remove(_WANTED)

    def key(self, *, new: bool) -> Ed25519PrivateKey | None:
        """The key of the next certificate where that is a new one: made once, and kept until it is used.

        Raises:
            StorageError: it cannot be written.
        """
        path = self._directory / KEY
        if path.exists():
            return load_private_key(path)
        if not new:
            return None
        key = Ed25519PrivateKey.generate()
        private_directory(self._directory)
        write_durably(path, [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())])
        return key

    def grant(self, bundle: EnrolmentBundle) -> TlsFiles:
        """Keeps a new certificate beside the present one; returns the files to try it with.

        Raises:
            StorageError: it cannot be written.
        """
        private_directory(self._directory)
        pem = ssl.DER_cert_to_PEM_cert(bundle.certificate).encode()
        write_durably(self._directory / _CERTIFICATE, [pem])
        write_durably(self._directory / ENROLMENT, [bundle.to_bytes()])
        own = self._directory / KEY
        key = own if own.exists() else self._state / KEY
        return TlsFiles(self._state / CA, self._directory / _CERTIFICATE, key)

    def adopt(self) -> None:
        """Makes the new certificate this device's.

        Raises:
            StorageError: it cannot be written; `finish` goes on.
        """
        write_durably(self._directory / _TRIED, [b""])
        self.finish()

    @property
    def unfinished(self) -> bool:
        """Whether `adopt` was cut off."""
        return (self._directory / _TRIED).exists()

    def finish(self) -> None:
        """Goes on where `adopt` was cut off; does nothing when it was not. Drops what was never tried.

        Raises:
            StorageError: it cannot be written.
        """
        if (self._directory / _TRIED).exists():
            if (self._directory / ENROLMENT).exists():
                with storage_errors("reading the new certificate"):
                    content = (self._directory / ENROLMENT).read_bytes()
                    key = (self._directory / KEY).read_bytes() if (self._directory / KEY).exists() else None
                bundle = EnrolmentBundle.from_bytes(content)
                if key is not None:
                    write_durably(self._state / KEY, [key])
                    request = create_request(load_private_key(self._state / KEY), bundle.device_id)
                    write_durably(self._state / REQUEST, [request])
                pem = ssl.DER_cert_to_PEM_cert(bundle.certificate).encode()
                write_durably(self._state / CERTIFICATE, [pem])
                write_durably(self._state / ENROLMENT, [content])
            # The bundle before the mark: without it, the mark stands for nothing.
            self._remove(ENROLMENT, KEY, _CERTIFICATE)
            self._remove(_TRIED)

    def _remove(self, *names: str) -> None:
        with storage_errors("removing what is not needed any more"):
            for name in names:
                (self._directory / name).unlink(missing_ok=True)
            if self._directory.exists():
                sync_directory(self._directory)
