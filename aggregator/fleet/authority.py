"""The keys of a fleet, and what it signs with them: certificates, plans and model manifests."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID
from pydantic import TypeAdapter, ValidationError

from aggregator.records import Device, IssuedCertificate
from models.manifest import ModelManifest
from protocol.client_release import RELEASE_KIND, ClientRelease
from protocol.enrolment import EnrolmentBundle
from protocol.errors import BadSignature
from protocol.fields import Slug
from protocol.identity import SignedDocument, create_ca, issue_certificate, open_request
from protocol.plan import MODEL_KIND, ORDER_KIND, PLAN_KIND, Plan
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment

CA_DAYS = 3650
DEVICE_DAYS = 730
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)


class EnrolmentRefused(Exception):
    """A signing request that gets no certificate; the message says what to do."""


class CaOffline(EnrolmentRefused):
    """A signing request that gets no certificate now, for the CA's key is not there; it may come again."""


class NameTaken(EnrolmentRefused):
    """A signing request whose name another key has, or a device that was sent away."""


@dataclass(frozen=True)
class Authority:
    """The fleet's CA and the operator's key.

    Attributes:
        ca: DER certificate.
        ca_key: signs device certificates; None where it is kept offline: a service needs none, and whoever
            has it can make puppets enough to surround a device.
        operator_key: signs plans and model manifests.
    """

    ca: bytes
    ca_key: Ed25519PrivateKey | None = field(repr=False)
    operator_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def create(cls, fleet: str, *, now: int, serial: int) -> Authority:
        """Makes new keys and a new CA certificate.

        Args:
            fleet: name of the fleet, a slug.
            now: seconds since 1970.
            serial: a random positive integer of at most 159 bits.
        """
        ca_key = Ed25519PrivateKey.generate()
        ca = create_ca(ca_key, _SLUG.validate_python(fleet), now=now, days=CA_DAYS, serial=serial)
        return cls(ca, ca_key, Ed25519PrivateKey.generate())

    @property
    def fleet(self) -> str:
        """The fleet's name, from the CA certificate."""
        subject = x509.load_der_x509_certificate(self.ca).subject
        return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    def sign_plan(self, plan: Plan) -> SignedDocument:
        """Signs a plan as the operator."""
        return SignedDocument.create(self.operator_key, PLAN_KIND, plan.to_bytes())

    def sign_order(self, plan: Plan) -> SignedDocument:
        """Signs a standing order to train as the operator."""
        return SignedDocument.create(self.operator_key, ORDER_KIND, plan.to_bytes())

    def sign_manifest(self, manifest: ModelManifest) -> SignedDocument:
        """Signs a model manifest as the operator."""
        return SignedDocument.create(self.operator_key, MODEL_KIND, manifest.to_bytes())

    def sign_release(self, release: ClientRelease) -> SignedDocument:
        """Signs a release of the client as the operator."""
        return SignedDocument.create(self.operator_key, RELEASE_KIND, release.to_bytes())

    def sign_assignment(self, assignment: VersionAssignment) -> SignedDocument:
        """Signs which version the fleet, or a device, is to have, as the operator."""
        return SignedDocument.create(self.operator_key, ASSIGNMENT_KIND, assignment.to_bytes())

    def bundle(self, device: Device, broker: str | None = None) -> EnrolmentBundle:
        """What an enrolled device is given; `broker` is where it finds the fleet."""
        operator = self.operator_key.public_key().public_bytes_raw()
        return EnrolmentBundle(
            fleet=self.fleet,
            device_id=device.device_id,
            certificate=device.certificate,
            ca=self.ca,
            plan_signers=(operator,),
            model_signers=(operator,),
            broker=broker,
        )

    def enrol(
        self,
        request: bytes,
        known: Device | None,
        *,
        name: str | None,
        now: float,
        serial: int,
        replaces: bool = False,
    ) -> Device:
        """Issues a certificate for a signing request.

        Args:
            request: PKCS#10, DER.
            known: the device already enrolled under that name, if any: only the same key may renew it.
            name: the id that the operator gives; the request's own name is taken when None.
            now: seconds since 1970.
            serial: a random positive integer of at most 159 bits.
            replaces: whether another key may take the name over, or a device come back that was sent away.

        Raises:
            CaOffline: the CA's key is kept elsewhere.
            NameTaken: the name is one of another key, or of a device that was sent away.
            EnrolmentRefused: a bad request or name.
        """
        try:
            asked, public_key = open_request(request)
            device_id = _SLUG.validate_python(name or asked)
        except BadSignature as error:
            raise EnrolmentRefused(f"{error}: make one with `covey-edge init`") from error
        except ValidationError as error:
            raise EnrolmentRefused(
                "a device id has lower-case letters, digits and hyphens, at most 63: give one with --name"
            ) from error
        if known is not None and not replaces:
            if not has_key(known, public_key):
                raise NameTaken(
                    f"{device_id} is enrolled with another key: choose another name with --name, or let the "
                    f"new device take its place by `covey device token --name {device_id} --replace`"
                )
            if known.state != "active":
                raise NameTaken(
                    f"{device_id} is {known.state}: a ticket of `covey device token --name {device_id} "
                    "--replace` lets it in again"
                )
        certificate = self.renew(device_id, public_key, now=now, serial=serial)
        return Device(device_id, certificate, enrolled_at=now)

    def renew(self, device_id: str, key: Ed25519PublicKey, *, now: float, serial: int) -> bytes:
        """Issues a certificate for a device's key; returns DER.

        Args:
            device_id: that the fleet recorded.
            key: which the device has proved to have.
            now: seconds since 1970.
            serial: a random positive integer of at most 159 bits.

        Raises:
            CaOffline: the CA's key is kept elsewhere.
        """
        if self.ca_key is None:
            raise CaOffline("the CA's key is kept elsewhere: put it back among the keys for a certificate")
        return issue_certificate(
            self.ca_key, self.ca, device_id, key, now=int(now), days=DEVICE_DAYS, serial=serial
        )


def has_key(device: Device, key: object) -> bool:
    """Whether a device's certificate is for this public key."""
    return bool(x509.load_der_x509_certificate(device.certificate).public_key() == key)


def issued_certificate(device: Device) -> IssuedCertificate:
    """The record of a device's certificate, by what the certificate says."""
    certificate = x509.load_der_x509_certificate(device.certificate)
    return IssuedCertificate(
        serial=f"{certificate.serial_number:x}",
        device_id=device.device_id,
        issued_at=device.enrolled_at,
        expires_at=certificate.not_valid_after_utc.timestamp(),
    )


def requested_name(request: bytes) -> str:
    """The device id that a signing request asks for.

    Raises:
        EnrolmentRefused: not a valid request.
    """
    try:
        return open_request(request)[0]
    except BadSignature as error:
        raise EnrolmentRefused(f"{error}: make one with `covey-edge init`") from error
