"""The certificates that the API and the broker show to those who connect: issued by the fleet's CA.

They hold P-256 keys and are for servers only, so that nobody can take one for a device's (those hold Ed25519
keys and are for clients only; `protocol.identity.verify_certificate`).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.fleet.authority import Authority, EnrolmentRefused
from protocol import identity

DAYS = 397
RENEW_DAYS = 30


def issue(
    authority: Authority,
    key: EllipticCurvePublicKey,
    names: Iterable[str],
    *,
    now: float,
    serial: int,
    subject: str = "covey-aggregator",
    days: int = DAYS,
) -> bytes:
    """Issues the certificate; returns PEM.

    Args:
        authority: with the CA's key.
        key: the server's public key.
        names: host names and IP addresses that clients may call it by.
        now: seconds since 1970.
        serial: a random positive integer of at most 159 bits.
        subject: its common name, for people; clients compare `names`.
        days: how long it is valid.

    Raises:
        EnrolmentRefused: the CA's key is kept elsewhere.
    """
    if authority.ca_key is None:
        raise EnrolmentRefused(
            f"{subject} needs a certificate, and the CA's key is kept elsewhere: put it back among the keys "
            "for a moment, or, for the API, name a certificate of your own in aggregator.json"
        )
    certificate = identity.issue(
        authority.ca_key,
        authority.ca,
        subject,
        key,
        ExtendedKeyUsageOID.SERVER_AUTH,
        now=int(now),
        days=days,
        serial=serial,
        names=[_general(name) for name in sorted(names)],
    )
    return certificate.public_bytes(Encoding.PEM)


def serves(certificate: bytes, ca: bytes, names: Iterable[str], *, now: float) -> bool:
    """Whether a certificate is this CA's, names all these names, and is valid for a while yet.

    Args:
        certificate: PEM.
        ca: DER.
        names: host names and IP addresses.
        now: seconds since 1970.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        found.verify_directly_issued_by(x509.load_der_x509_certificate(ca))
        given = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # a damaged or foreign one: the parser and the verifier raise a wide family
        return False
    soon = dt.datetime.fromtimestamp(now, dt.UTC) + dt.timedelta(days=RENEW_DAYS)
    return {_general(name) for name in names} <= set(given) and soon < found.not_valid_after_utc


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
