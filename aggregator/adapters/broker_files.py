"""What the broker is started with, and what the aggregator shows it, as files.

STATE/broker/start, mosquitto.conf        how the broker is started, and its configuration
STATE/broker/access.json                  who may do what, as the aggregator wrote it last
STATE/broker/ca.pem, revoked.pem          whose certificates it takes, and which of them not any more
STATE/broker/server.pem, server-key.pem   its own certificate, by the fleet's CA
STATE/broker/data/                        what it keeps
STATE/keys/aggregator.pem, aggregator-key.pem   the certificate by which it knows the aggregator
"""

from __future__ import annotations

import secrets
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.fleet import access, broker, revocation, server_certificate
from aggregator.fleet.authority import Authority
from aggregator.private_file import replace_private
from aggregator.records import IssuedCertificate
from protocol.broker_address import BrokerAddress

CONFIGURATION_FILE = "mosquitto.conf"
IDENTITY_CERTIFICATE = "aggregator.pem"
SERVER_CERTIFICATE = broker.CERTIFICATE_FILE
IDENTITY_KEY = "aggregator-key.pem"


def write(
    directory: Path,
    keys: Path,
    authority: Authority,
    address: BrokerAddress,
    names: Iterable[str] = (),
    *,
    devices: Iterable[str] = (),
    revoked: Iterable[IssuedCertificate] = (),
    now: float,
) -> None:
    """Writes all of them, readable by their owner only; those that are there are replaced.

    Args:
        directory: `STATE/broker`.
        keys: `STATE/keys`.
        authority: with the CA's key.
        address: where clients reach the broker.
        names: more host names and addresses that its certificate is to hold.
        devices: ids of those that may connect.
        revoked: certificates that let nobody in any more.
        now: seconds since 1970.

    Raises:
        EnrolmentRefused: the CA's key is kept elsewhere.
    """
    own = {"localhost", "127.0.0.1", "::1", socket.gethostname(), address.host, *names} - {""}
    server_key, identity_key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    server = server_certificate.issue(
        authority,
        server_key.public_key(),
        own,
        now=now,
        serial=secrets.randbits(120) | 1,
        subject=broker.BROKER,
        days=broker.DAYS,
    )
    identity = broker.issue_aggregator(
        authority, identity_key.public_key(), now=now, serial=secrets.randbits(120) | 1
    )
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / broker.DATA_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
    replace_private(directory / broker.CA_FILE, ssl.DER_cert_to_PEM_cert(authority.ca).encode())
    replace_private(directory / broker.KEY_FILE, _pem(server_key))
    replace_private(directory / broker.CERTIFICATE_FILE, server)
    replace_private(directory / broker.ACCESS_FILE, access.document(access.wanted(devices)))
    write_revoked(directory, authority, revoked, now=now)
    replace_private(directory / broker.START_FILE, broker.start_script(CONFIGURATION_FILE).encode())
    replace_private(
        directory / CONFIGURATION_FILE, broker.configuration(authority.fleet, address.port).encode()
    )
    replace_private(keys / IDENTITY_KEY, _pem(identity_key))
    replace_private(keys / IDENTITY_CERTIFICATE, identity)


def write_revoked(
    directory: Path, authority: Authority, revoked: Iterable[IssuedCertificate], *, now: float
) -> None:
    """Writes the list of revoked certificates, which a running broker takes up within seconds.

    Raises:
        EnrolmentRefused: the CA's key is kept elsewhere.
    """
    replace_private(directory / broker.REVOKED_FILE, revocation.revocation_list(authority, revoked, now=now))


def revoked_serials(directory: Path) -> frozenset[str] | None:
    """The serial numbers that the list holds, as `aggregator.records.IssuedCertificate` has them.

    None when there is no list that can be read.
    """
    try:
        listed = x509.load_pem_x509_crl((directory / broker.REVOKED_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return frozenset(f"{each.serial_number:x}" for each in listed)


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
