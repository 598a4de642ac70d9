"""What a device is given when it joins a fleet: its certificate, and whom it may trust from then on.

The bundle is public: it holds no private key. It must still come to the device by a trusted way (an
operator's hands, or TLS pinned by an enrolment token), since it names the signers that it will obey.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from protocol.errors import BadSignature, MalformedMessage
from protocol.fields import PROTOCOL_VERSION, Bytes32, Certificate, Schema, Slug
from protocol.identity import DeviceCertificate, key_id, verify_certificate

MAX_BUNDLE_BYTES = 65_536

Signers = Annotated[tuple[Bytes32, ...], Field(min_length=1, max_length=16)]
"""Raw Ed25519 public keys."""


class EnrolmentBundle(Schema):
    """A device's place in a fleet, as the operator hands it over.

    Example:
        bundle = EnrolmentBundle(fleet="barn", device_id="barn-1", certificate=der, ca=ca_der,
                                 plan_signers=(plan_key.public_bytes_raw(),),
                                 model_signers=(model_key.public_bytes_raw(),))
        Path("barn-1.json").write_bytes(bundle.to_bytes())
    """

    type: Literal["covey-enrolment"] = "covey-enrolment"
    v: Literal[1] = PROTOCOL_VERSION
    fleet: Slug
    device_id: Slug
    certificate: Certificate
    """DER of the device's own certificate, issued by the fleet CA to the device's key."""
    ca: Certificate
    """DER of the fleet CA's certificate."""
    plan_signers: Signers
    """Who may sign training plans."""
    model_signers: Signers
    """Who may sign model manifests."""

    def to_bytes(self) -> bytes:
        """The JSON of the bundle, indented for the eyes of an operator."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> EnrolmentBundle:
        """Parses a bundle; `verify` says whether it holds together.

        Raises:
            MalformedMessage: it is not an enrolment bundle of this version.
        """
        if len(data) > MAX_BUNDLE_BYTES:
            raise MalformedMessage(f"an enrolment bundle has at most {MAX_BUNDLE_BYTES} bytes")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MalformedMessage(f"not an enrolment bundle: {where}: {first['msg']}") from error

    def verify(self, *, now: int) -> DeviceCertificate:
        """Checks that the parts belong together: the CA is the fleet's and it issued the certificate.

        Args:
            now: current time, seconds since 1970.

        Raises:
            BadSignature: they do not, or the certificate is not valid at `now`.
        """
        try:
            authority = x509.load_der_x509_certificate(self.ca)
            names = authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            authority.verify_directly_issued_by(authority)
        except Exception as error:  # the parser and the verifier raise a wide and changing family
            raise BadSignature("the bundle's CA is not a self-signed certificate") from error
        if [name.value for name in names] != [self.fleet]:
            raise BadSignature(f"the bundle's CA is not the one of the fleet {self.fleet}")
        certificate = verify_certificate(self.certificate, self.ca, now=now)
        if certificate.device_id != self.device_id:
            raise BadSignature(f"the certificate names {certificate.device_id}, the bundle {self.device_id}")
        return certificate

    def plan_keys(self) -> dict[str, Ed25519PublicKey]:
        """Plan signers by key id, as `SignedDocument.open` takes them."""
        return _by_id(self.plan_signers)

    def model_keys(self) -> dict[str, Ed25519PublicKey]:
        """Model signers by key id, as `SignedDocument.open` takes them."""
        return _by_id(self.model_signers)


def _by_id(raw_keys: tuple[bytes, ...]) -> dict[str, Ed25519PublicKey]:
    keys = (Ed25519PublicKey.from_public_bytes(raw) for raw in raw_keys)
    return {key_id(key): key for key in keys}
