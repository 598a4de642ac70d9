"""The files of the aggregator's connection to the broker."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from protocol.broker_address import InvalidAddress


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for a TLS connection.

    Attributes:
        ca: who may have signed the broker's certificate; None trusts the system's list.
        certificate: the aggregator's own; None when the broker asks for none.
        key: its private key.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS settings.

        Raises:
            InvalidAddress: a file is missing or no PEM.
        """
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidAddress(f"the TLS files cannot be used: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context
