"""When a device's certificate is to be renewed, and what the request for it proves. Pure.

A device asks when two thirds of its certificate's time are over, and a little later by chance: devices of one
day do not ask on one day. Both keys sign: that of the new certificate in the signing request (PKCS#10), which
proves that the device has it, and the present one's over fleet and request, which proves who asks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.identity import create_request, sign, verify
from protocol.messages import RenewalRequest

RENEWAL_KIND = "renewal"
DUE_SHARE = 2 / 3
SPREAD_SHARE = 1 / 12
"""Of its lifetime, over which devices spread after `DUE_SHARE`."""


@dataclass(frozen=True)
class Lifetime:
    """When a certificate is valid, and when it is to be renewed; seconds since 1970."""

    begins: float
    due: float
    ends: float

    @classmethod
    def of(cls, certificate: bytes) -> Lifetime:
        """Reads it from a certificate, DER.

        The moment within the spread follows from the certificate, so that it stays over restarts.
        """
        parsed = x509.load_der_x509_certificate(certificate)
        begins, ends = parsed.not_valid_before_utc.timestamp(), parsed.not_valid_after_utc.timestamp()
        chance = int.from_bytes(hashlib.sha256(certificate).digest()[:4], "big") / 2**32
        due = begins + (DUE_SHARE + SPREAD_SHARE * chance) * (ends - begins)
        return cls(begins, due, ends)

    def is_due(self, now: float) -> bool:
        """Whether to ask now. Also when it has ended by a clock that may be wrong: asking does no harm."""
        return now >= self.due


def ask(
    fleet: str, device_id: str, certificate: bytes, identity: Ed25519PrivateKey, key: Ed25519PrivateKey
) -> RenewalRequest:
    """Makes the request.

    Args:
        fleet: name of the fleet.
        device_id: of the device.
        certificate: the present one, DER.
        identity: its key.
        key: of the new certificate; the same, or a new one.
    """
    request = create_request(key, device_id)
    return RenewalRequest(
        request=request,
        certificate=certificate,
        signature=sign(identity, RENEWAL_KIND, _signed(fleet, request)),
    )


def check_request(asked: RenewalRequest, present: Ed25519PublicKey, fleet: str) -> None:
    """Checks who asks.

    Args:
        present: key of the certificate that is shown.
        fleet: name of the fleet.

    Raises:
        BadSignature: somebody else.
    """
    verify(present, RENEWAL_KIND, _signed(fleet, asked.request), asked.signature)


def _signed(fleet: str, request: bytes) -> bytes:
    name = fleet.encode()
    return len(name).to_bytes(2, "big") + name + request
