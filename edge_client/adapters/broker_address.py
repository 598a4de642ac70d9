"""Where the broker is, and how the way to it is protected."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")


class InvalidAddress(ValueError):
    """A broker address that cannot be used; the message says what to write."""


@dataclass(frozen=True)
class BrokerAddress:
    """A broker as `--broker` names it.

    Attributes:
        tls: whether the connection is encrypted and the broker authenticated.
    """

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str, *, insecure: bool = False) -> Self:
        """Reads `mqtt://host[:port]` or `mqtts://host[:port]`.

        Args:
            url: the address.
            insecure: allow an unencrypted connection to another machine.

        Raises:
            InvalidAddress: it is no such address, or would send everything in the clear.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidAddress(f"{url!r} is no broker address: {error}") from error
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or not _HOST.fullmatch(parts.hostname):
            raise InvalidAddress(f"{url!r} is no broker address: write mqtts://HOST or mqtts://HOST:PORT")
        if parts.username or parts.password or parts.path.strip("/") or parts.query or parts.fragment:
            raise InvalidAddress(
                "a broker address has a host and a port only: a certificate says who you are"
            )
        address = cls(parts.hostname, port or DEFAULT_PORTS[parts.scheme], parts.scheme == "mqtts")
        if not (address.tls or address.loopback or insecure):
            raise InvalidAddress(
                f"mqtt://{address.host} would be unencrypted and unauthenticated: use mqtts://, "
                "or --insecure on a network that you trust"
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
        """The address as it is written."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


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
