"""The list of revoked certificates (RFC 5280, section 5), which the broker reads when it starts. Pure.

It is the second lock: the broker's access (`aggregator.fleet.access`) ends the connection of a revoked device
at once and leaves it no rights; this list keeps it from getting as far as that.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator.fleet.authority import Authority, EnrolmentRefused
from aggregator.records import IssuedCertificate


def revocation_list(authority: Authority, revoked: Iterable[IssuedCertificate], *, now: float) -> bytes:
    """Signs the list; returns PEM.

    It is valid as long as the CA: a broker with an outdated list would let nobody in, and what must be known
    at once does not wait for this list.

    Args:
        authority: with the CA's key.
        revoked: what is revoked; what has expired is left out.
        now: seconds since 1970.

    Raises:
        EnrolmentRefused: the CA's key is kept elsewhere.
    """
    if authority.ca_key is None:
        raise EnrolmentRefused("the list of revoked certificates needs the CA's key, which is kept elsewhere")
    issuer = x509.load_der_x509_certificate(authority.ca)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(_time(now) - dt.timedelta(hours=1))
        .next_update(issuer.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(now)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.ca_key.public_key()), critical=False
        )
    )
    for certificate in revoked:
        if certificate.revoked_at is not None and certificate.expires_at > now:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(int(certificate.serial, 16))
                .revocation_date(_time(certificate.revoked_at))
                .build()
            )
    return builder.sign(authority.ca_key, algorithm=None).public_bytes(Encoding.PEM)


def _time(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(seconds), dt.UTC)
