"""Where the broker is: one address format for devices, the aggregator and the demo. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
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
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
