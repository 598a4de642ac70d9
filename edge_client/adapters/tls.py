"""The files of the device's mutually authenticated connection to the broker."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from protocol.broker_address import InvalidAddress


@dataclass(frozen=True)
class TlsFiles:
    """The files of a mutually authenticated connection, all PEM."""

    ca: Path
    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """The TLS settings: the broker's name is checked against this CA only, and this device shows itself.

        Raises:
            InvalidAddress: a file is missing or does not fit the others.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cafile=self.ca)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidAddress(
                f"TLS needs the CA in {self.ca} and this device's certificate and key in {self.certificate} "
                f"and {self.key}: {error}"
            ) from error
        return context
