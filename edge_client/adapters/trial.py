"""Shows the broker a certificate without speaking MQTT: a session of this device goes on beside it."""

from __future__ import annotations

import socket
import ssl

from edge_client.adapters.tls import TlsFiles
from edge_client.renewing import Trial
from protocol.broker_address import BrokerAddress, InvalidAddress

CONNECT_SECONDS = 5.0
VERDICT_SECONDS = 1.5
"""How long a broker may take to refuse: in TLS 1.3 it does so after the handshake (RFC 8446, 4.4.2.4)."""


def try_certificate(address: BrokerAddress, files: TlsFiles) -> Trial:
    """What the broker says to a certificate; a broker without TLS takes any.

    Args:
        address: of the broker.
        files: with the certificate and its key.
    """
    if not address.tls:
        return Trial.TAKEN
    try:
        context = files.context()
    except InvalidAddress:
        return Trial.REFUSED
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as secured,
        ):
            secured.settimeout(VERDICT_SECONDS)
            try:
                return Trial.UNREACHABLE if secured.recv(1) == b"" else Trial.TAKEN
            except TimeoutError:
                # A broker that takes it waits for more, and says nothing.
                return Trial.TAKEN
    except ssl.SSLError as error:
        return Trial.REFUSED if "ALERT" in (error.reason or "") else Trial.UNREACHABLE
    except OSError:
        return Trial.UNREACHABLE
