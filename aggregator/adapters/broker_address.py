"""Where the broker is, and how to be sure that it is the broker."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


class InvalidAddress(ValueError):
    """An address that cannot be used; the message says what to write."""


@dataclass(frozen=True)
class BrokerAddress:
    """Host and port of a broker."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str, *, insecure: bool = False) -> BrokerAddress:
        """Parses `mqtt://host[:port]` or `mqtts://host[:port]`.

        Args:
            url: the address.
            insecure: allow an unencrypted connection to another machine.

        Raises:
            InvalidAddress: no such address, or one that would send everything in the clear.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise InvalidAddress("the port of the broker's address is no number below 65536") from error
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
            raise InvalidAddress("a broker's address looks like mqtt://localhost:1883 or mqtts://broker:8883")
        if parts.username is not None or parts.password is not None:
            # It would be seen in process lists and logs.
            raise InvalidAddress("credentials do not belong into the broker's address: use a certificate")
        tls = parts.scheme == "mqtts"
        address = cls(parts.hostname, port or (8883 if tls else 1883), tls)
        if not (tls or insecure or address.loopback):
            raise InvalidAddress(
                f"{url} is another machine and unencrypted: use mqtts://, or --insecure on a network that "
                "you trust"
            )
        return address

    @property
    def loopback(self) -> bool:
        """Whether the broker is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


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
