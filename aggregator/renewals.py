"""New certificates for devices that ask for one with what they have: over MQTT, before the old one ends.

Who asks shows a certificate of the fleet that is neither expired nor revoked, and signs the request with its
key. The same request may come again, since its answer may be lost: whoever has a young certificate for the
key gets that one again, so that neither a repeated message nor a wrong clock makes many. The old certificate
stays good until it ends: a device that was cut off in the middle still has it, and rounds that run know it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.clock import Moment
from aggregator.fleet.authority import Authority, CaOffline, has_key, issued_certificate
from aggregator.records import Device
from aggregator.repository import Writer
from protocol.errors import BadSignature
from protocol.identity import open_request, verify_certificate
from protocol.messages import RenewalAnswer, RenewalRequest
from protocol.renewal import check_request

logger = logging.getLogger(__name__)

YOUNG_SHARE = 0.5
"""Of its lifetime, in which a certificate is not replaced by another one for the same key."""
NEW_KEY_SECONDS = 3600.0
"""How long after a certificate was issued another key may take its place."""
OFFLINE_SECONDS = 6 * 3600


class Renewals:
    """Belongs to the main loop."""

    def __init__(self, load_authority: Callable[[], Authority]) -> None:
        """Prepares it.

        Args:
            load_authority: reads the fleet's keys, with the CA's if it is there, for this one certificate.
        """
        self._load_authority = load_authority

    def answer(self, writer: Writer, device: Device, asked: RenewalRequest, at: Moment) -> RenewalAnswer:
        """What a device is answered; a new certificate is recorded in the transaction.

        Args:
            device: that asks, by its topic; it is in the fleet.
        """
        now = int(at.unix)
        try:
            authority = self._load_authority()
            shown = verify_certificate(asked.certificate, authority.ca, now=now)
            check_request(asked, shown.public_key, authority.fleet)
            _, key = open_request(asked.request)
        except BadSignature as error:
            return RenewalAnswer(code="bad-request", detail=str(error)[:300], time=now)
        good = {each.serial for each in writer.certificates(device.device_id, revoked=False)}
        if shown.device_id != device.device_id or _serial(asked.certificate) not in good:
            return RenewalAnswer(
                code="bad-request", detail="the certificate that you show is revoked, or not yours", time=now
            )
        if (young := _young(device.certificate, key, at.unix)) is not None:
            return RenewalAnswer(code=young, certificate=device.certificate, time=now)
        if not has_key(device, key) and at.unix - _issued(writer, device) < NEW_KEY_SECONDS:
            return RenewalAnswer(
                code="too-soon", detail="another key came a moment ago", again=int(NEW_KEY_SECONDS), time=now
            )
        try:
            issued = authority.renew(device.device_id, key, now=at.unix, serial=secrets.randbits(120) | 1)
        except CaOffline as error:
            logger.warning("the certificate of %s is not renewed: %s", device.device_id, error)
            return RenewalAnswer(code="ca-offline", detail=str(error), again=OFFLINE_SECONDS, time=now)
        writer.replace_certificate(device.device_id, issued)
        writer.add_certificate(issued_certificate(replace(device, certificate=issued, enrolled_at=at.unix)))
        logger.info("renewed the certificate of %s", device.device_id)
        return RenewalAnswer(code="renewed", certificate=issued, time=now)


def _young(certificate: bytes, key: Ed25519PublicKey, now: float) -> str | None:
    """`renewed` when it is for this key and young; None when another one is due."""
    known = x509.load_der_x509_certificate(certificate)
    if known.public_key() != key:
        return None
    begins, ends = known.not_valid_before_utc.timestamp(), known.not_valid_after_utc.timestamp()
    return "renewed" if now < begins + YOUNG_SHARE * (ends - begins) else None


def _serial(certificate: bytes) -> str:
    return f"{x509.load_der_x509_certificate(certificate).serial_number:x}"


def _issued(writer: Writer, device: Device) -> float:
    """When the device's newest certificate was issued."""
    return max((each.issued_at for each in writer.certificates(device.device_id)), default=0.0)
