"""Remembering certificates that verified: a fleet's cohorts are the same devices again and again."""

from __future__ import annotations

import hashlib

from protocol.identity import DeviceCertificate, verify_certificate


class CertificateCache:
    """Verifies certificates; what a certificate's bytes decide for good is decided once.

    The CA's signature, the name, the key and the extensions follow from the bytes of the certificate and of
    the CA's, so they are remembered under the hash of both. Whether the certificate is valid *now* is checked
    every time. A certificate that failed is not remembered. Revocation is no matter of certificates: who is
    invited decides the aggregator, and who may check in is checked before its certificate is looked at.
    """

    def __init__(self, limit: int = 2**14) -> None:
        """Makes an empty cache.

        Args:
            limit: certificates to remember; the longest known one makes room.
        """
        self._limit = limit
        self._known: dict[bytes, DeviceCertificate] = {}

    def verify(self, certificate: bytes, ca: bytes, *, now: int) -> DeviceCertificate:
        """`protocol.identity.verify_certificate`, at a hundredth of its cost for a certificate known before.

        Raises:
            BadSignature: what `verify_certificate` would refuse.
        """
        name = hashlib.sha256(len(ca).to_bytes(4, "big") + ca + certificate).digest()
        known = self._known.get(name)
        if known is not None:
            known.check_time(now)
            return known
        verified = verify_certificate(certificate, ca, now=now)
        if len(self._known) >= self._limit:
            del self._known[next(iter(self._known))]
        self._known[name] = verified
        return verified
