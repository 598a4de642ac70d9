"""Where to listen: an address that is safe for tokens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

DEFAULT_LISTEN = "127.0.0.1:8443"


class CannotListen(Exception):
    """The address cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ListenAddress:
    """A place to listen at, such as `127.0.0.1:8443`, `[::]:8443`, `0.0.0.0:0`, with or without a scheme.

    Attributes:
        tls: whether connections are encrypted; never without it beyond this machine.
    """

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Parses an address: without a scheme, `http` on a loopback address and `https` elsewhere.

        Raises:
            CannotListen: it is none, or it would be unencrypted beyond this machine.
        """
        scheme, separator, rest = text.rpartition("://")
        host, _, port = rest.rpartition(":")
        host = host.strip("[]")
        if (
            not host
            or not port.isdigit()
            or int(port) > 65535
            or (separator and scheme not in ("http", "https"))
        ):
            raise CannotListen(
                f"{text} is no address to listen at: write 127.0.0.1:8443 or https://0.0.0.0:8443"
            )
        near = is_loopback(host)
        if scheme == "http" and not near:
            raise CannotListen(
                f"{text} would send tokens unencrypted: write https://, or listen on 127.0.0.1"
            )
        return cls(host, int(port), tls=scheme == "https" or not near)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
