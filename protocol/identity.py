"""Who is who: Ed25519 identities, certificates of the fleet CA, and signed documents.

Certificates are X.509 (RFC 5280, Ed25519 by RFC 8410), so that the certificate that signs a round's keys is
the one that opens the device's TLS session. Every signature covers a kind, so that none is valid for a
document of another kind.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from pydantic import Field, TypeAdapter

from protocol.errors import BadSignature
from protocol.fields import Bytes64, Schema, Sha256, Slug

SIGNATURE_BYTES = 64
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)


def _signing_input(kind: str, payload: bytes) -> bytes:
    label = kind.encode()
    return b"covey/v1/signature/" + len(label).to_bytes(2, "big") + label + payload


def key_id(public_key: Ed25519PublicKey) -> str:
    """Names a public key: the SHA-256 of its 32 raw bytes, in hexadecimal."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def sign(key: Ed25519PrivateKey, kind: str, payload: bytes) -> bytes:
    """Signs `payload` as a document of `kind` (Ed25519, RFC 8032); returns 64 bytes."""
    return key.sign(_signing_input(kind, payload))


def verify(public_key: Ed25519PublicKey, kind: str, payload: bytes, signature: bytes) -> None:
    """Checks a signature made by `sign`.

    Raises:
        BadSignature: it does not verify.
    """
    if not _verifies(public_key, _signing_input(kind, payload), signature):
        raise BadSignature(f"the signature of this {kind} does not verify")


def _verifies(public_key: Ed25519PublicKey, content: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature verifies (RFC 8032), by libsodium: in two thirds of OpenSSL's time.

    It is the stricter of the two, and refuses keys and nonces of small order, under which a signature is good
    for many messages. All parties must agree on what verifies, or one client's could be refused by some: so
    there is no other way to verify here.
    """
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + content, public_key.public_bytes_raw())
    except BadSignatureError:
        return False
    return True


class SignedDocument(Schema):
    """Bytes with the signature of one named key. The payload is parsed only after the check."""

    kind: Slug
    payload: Annotated[bytes, Field(max_length=65_536)]
    key_id: Sha256
    signature: Bytes64

    @classmethod
    def create(cls, key: Ed25519PrivateKey, kind: str, payload: bytes) -> SignedDocument:
        """Signs `payload` as a document of `kind`."""
        return cls(
            kind=kind,
            payload=payload,
            key_id=key_id(key.public_key()),
            signature=sign(key, kind, payload),
        )

    def open(self, kind: str, signers: dict[str, Ed25519PublicKey]) -> bytes:
        """Returns the payload if one of the `signers` (by key id) signed it as `kind`.

        Raises:
            BadSignature: another kind, an unknown signer or a wrong signature.
        """
        if self.kind != kind:
            raise BadSignature(f"this is a signed {self.kind}, not a {kind}")
        signer = signers.get(self.key_id)
        if signer is None:
            raise BadSignature(f"this {kind} is signed by the unknown key {self.key_id[:16]}")
        verify(signer, kind, self.payload, self.signature)
        return self.payload

    @property
    def digest(self) -> bytes:
        """SHA-256 of the payload: how a round refers to its plan."""
        return hashlib.sha256(self.payload).digest()


@dataclass(frozen=True)
class DeviceCertificate:
    """What a verified certificate says: this device owns this key.

    Attributes:
        not_before, not_after: seconds since 1970 between which it is valid, both included.
    """

    device_id: str
    public_key: Ed25519PublicKey
    not_before: float
    not_after: float

    def check_time(self, now: float) -> None:
        """Refuses a certificate that is not valid at `now`, seconds since 1970.

        Raises:
            BadSignature: it is expired or not yet valid.
        """
        if not self.not_before <= now <= self.not_after:
            raise BadSignature(
                f"the certificate of {self.device_id} is expired or not yet valid: check the clock"
            )


_CA_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _time(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _builder(subject: str, issuer: str, start: int, end: int, serial: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .serial_number(serial)
        .not_valid_before(_time(start))
        .not_valid_after(_time(end))
    )


def create_ca(key: Ed25519PrivateKey, fleet: str, *, now: int, days: int, serial: int) -> bytes:
    """Makes the self-signed certificate of a fleet's CA; returns DER.

    Args:
        key: the CA's private key.
        fleet: the fleet's name, which becomes the common name.
        now: current time, seconds since 1970.
        days: how long it is valid.
        serial: a random positive integer of at most 159 bits.
    """
    builder = _builder(fleet, fleet, now - 3600, now + days * 86_400, serial)
    return (
        builder.public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CA_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, algorithm=None)
        .public_bytes(Encoding.DER)
    )


def issue(
    ca_key: Ed25519PrivateKey,
    ca: bytes,
    subject: str,
    public_key: CertificatePublicKeyTypes,
    usage: x509.ObjectIdentifier,
    *,
    now: int,
    days: int,
    serial: int,
    names: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """Issues a certificate for whatever the fleet has: a device, the broker, the aggregator.

    A server's has the authority's key identifier, without which a strict client (RFC 5280, section 4.2.1.1;
    Python from 3.13 on) refuses it. A device's has not: it stands in every roster, where its bytes count.

    Args:
        ca_key: the CA's private key.
        ca: DER of its certificate.
        subject: the common name.
        public_key: of the subject.
        usage: the one extended key usage; servers and clients never share one.
        now: current time, seconds since 1970; it is valid from an hour before.
        days: how long it is valid.
        serial: a random positive integer of at most 159 bits.
        names: subject alternative names, of a server.
    """
    issuer = x509.load_der_x509_certificate(ca)
    fleet = issuer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    builder = (
        _builder(subject, str(fleet), now - 3600, now + days * 86_400, serial)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    if names:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(authority, critical=False)
    return builder.sign(ca_key, algorithm=None)


def issue_certificate(
    ca_key: Ed25519PrivateKey,
    ca: bytes,
    device_id: str,
    public_key: Ed25519PublicKey,
    *,
    now: int,
    days: int,
    serial: int,
) -> bytes:
    """Issues a device certificate; returns DER.

    The common name is the `device_id` that the fleet recorded, never one that the device asked for.
    """
    certificate = issue(
        ca_key,
        ca,
        _SLUG.validate_python(device_id),
        public_key,
        ExtendedKeyUsageOID.CLIENT_AUTH,
        now=now,
        days=days,
        serial=serial,
    )
    return certificate.public_bytes(Encoding.DER)


def verify_certificate(certificate: bytes, ca: bytes, *, now: int) -> DeviceCertificate:
    """Checks that the fleet CA issued this device certificate and that it is valid at `now`.

    Args:
        certificate: DER of a device certificate.
        ca: DER of the fleet CA's certificate, which is trusted.
        now: current time, seconds since 1970.

    Raises:
        BadSignature: not a certificate, of another CA, expired, not yet valid, or not a device's.
    """
    try:
        issuer, issuer_key = _issuer(ca)
        subject = x509.load_der_x509_certificate(certificate)
        issued = (
            subject.issuer == issuer
            and subject.signature_algorithm_oid == SignatureAlgorithmOID.ED25519
            and _verifies(issuer_key, subject.tbs_certificate_bytes, subject.signature)
        )
        names = subject.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        usage = subject.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        constraints = subject.extensions.get_extension_for_class(x509.BasicConstraints).value
        device_id = _SLUG.validate_python(names[0].value)
        public_key = subject.public_key()
    except Exception as error:  # the parser raises a wide and changing family
        raise BadSignature(f"not a device certificate of this fleet: {type(error).__name__}") from error
    if not issued:
        raise BadSignature("not a device certificate of this fleet: its CA did not sign it")
    if constraints.ca or ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise BadSignature(f"the certificate of {device_id} is not a device's")
    if not isinstance(public_key, Ed25519PublicKey):
        raise BadSignature(f"the certificate of {device_id} holds no Ed25519 key")
    verified = DeviceCertificate(
        device_id,
        public_key,
        subject.not_valid_before_utc.timestamp(),
        subject.not_valid_after_utc.timestamp(),
    )
    verified.check_time(now)
    return verified


@lru_cache(maxsize=8)
def _issuer(ca: bytes) -> tuple[x509.Name, Ed25519PublicKey]:
    """Name and key of a fleet's CA."""
    certificate = x509.load_der_x509_certificate(ca)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("the key of this CA is not Ed25519")
    return certificate.subject, key


def create_request(key: Ed25519PrivateKey, device_id: str) -> bytes:
    """Makes a certificate signing request (PKCS#10) that proves possession of `key`; returns DER."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm=None)
    return request.public_bytes(Encoding.DER)


def open_request(request: bytes) -> tuple[str, Ed25519PublicKey]:
    """Checks a signing request; returns the name it asks for and its key.

    Raises:
        BadSignature: malformed, wrong proof of possession, or not Ed25519.
    """
    try:
        parsed = x509.load_der_x509_csr(request)
        public_key = parsed.public_key()
        name = str(parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        # Not by OpenSSL: under a key of small order, it takes a signature that anybody can make.
        valid = isinstance(public_key, Ed25519PublicKey) and _verifies(
            public_key, parsed.tbs_certrequest_bytes, parsed.signature
        )
    except Exception as error:  # as above
        raise BadSignature("not a certificate signing request") from error
    if not valid or not isinstance(public_key, Ed25519PublicKey):
        raise BadSignature("the request does not prove possession of an Ed25519 key")
    return name, public_key
