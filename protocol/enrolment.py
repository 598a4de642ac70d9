"""How a device joins a fleet: a ticket lets it in, and a bundle says whom it may trust from then on.

The ticket is one line of text, and a secret. With it a device asks the fleet's API for a certificate, over
TLS by the certification authority whose digest the ticket holds. The answer's bundle is public: it holds no
private key. It must still come to the device by a trusted way (this one, or an operator's hands), since it
names the signers that the device will obey.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID
from pydantic import AfterValidator, Field, ValidationError

from protocol.errors import BadSignature, MalformedMessage
from protocol.fields import PROTOCOL_VERSION, Bytes32, Certificate, Schema, Sha256, Slug, UnixTime
from protocol.identity import DeviceCertificate, key_id, verify_certificate

MAX_BUNDLE_BYTES = 65_536
MAX_TICKET_CHARACTERS = 512
MAX_REQUEST_BYTES = 8_192
MAX_ANSWER_BYTES = MAX_BUNDLE_BYTES + 4_096
ENROLMENTS_PATH = "/api/v1/enrolments"
"""Where a device posts its request; the certification authority of the ticket's pin is at `TRUST_PATH`."""
TRUST_PATH = "/api/v1/enrolments/trust"

_HOST = r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])"
_API = rf"https://{_HOST}(?::[0-9]{{1,5}})?"
_FORM = r"[0-9a-f]{12}_[0-9a-f]{64}"
_TICKET = re.compile(rf"covey\+({_API})/([a-z0-9][a-z0-9-]{{0,62}})#({_FORM})\.([0-9a-f]{{64}})")


def _reachable(url: str) -> str:
    """Refuses what looks like an address, and that no socket takes."""
    parts = urlsplit(url)
    if parts.port == 0:
        raise ValueError("no port 0")
    (parts.hostname or "").encode("idna")
    return url


ApiUrl = Annotated[str, Field(max_length=280, pattern=f"^{_API}$"), AfterValidator(_reachable)]
EnrolmentSecret = Annotated[str, Field(pattern=f"^{_FORM}$", repr=False)]
"""An enrolment token: its public id, and 256 random bits, both in hexadecimal."""
BrokerUrl = Annotated[str, Field(max_length=280, pattern=rf"^mqtts?://{_HOST}(?::[0-9]{{1,5}})?$")]
T = TypeVar("T", bound="Schema")

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
    broker: BrokerUrl | None = None
    """Where the fleet meets; None in bundles from before this was said."""

    def to_bytes(self) -> bytes:
        """The JSON of the bundle, indented for the eyes of an operator."""
        return self.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> EnrolmentBundle:
        """Parses a bundle; `verify` says whether it holds together.

        Raises:
            MalformedMessage: it is not an enrolment bundle of this version.
        """
        return _parsed(cls, data, MAX_BUNDLE_BYTES, "an enrolment bundle")

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


class EnrolmentTicket(Schema):
    """What lets one device into a fleet, once: `covey+https://hub.example:8443/barn-1#TOKEN.PIN`.

    Example:
        ticket = EnrolmentTicket.from_text(Path("barn-1.ticket").read_text())
        ticket.url, ticket.name
    """

    url: ApiUrl
    """The fleet's API."""
    name: Slug
    """Who it is for; the certificate says what the fleet recorded with the token, whatever stands here."""
    token: EnrolmentSecret
    trust_sha256: Sha256
    """SHA-256 of the DER of the certificate by which the API's TLS certificate is checked."""

    def to_text(self) -> str:
        """The ticket's line. The token is behind `#`, which no HTTP client sends to a server by mistake."""
        return f"covey+{self.url}/{self.name}#{self.token}.{self.trust_sha256}"

    @classmethod
    def from_text(cls, text: str) -> EnrolmentTicket:
        """Reads a ticket's line; white space around it does not matter.

        Raises:
            MalformedMessage: it is none. The message does not repeat it: it may be one with a wrong letter.
        """
        if len(text) > 2 * MAX_TICKET_CHARACTERS:
            raise MalformedMessage(
                f"an enrolment ticket is one line of at most {MAX_TICKET_CHARACTERS} characters"
            )
        found = _TICKET.fullmatch(text.strip())
        if found is None:
            raise MalformedMessage(
                "not an enrolment ticket: one is a line that `covey device token` printed, covey+https://..."
            )
        try:
            return cls(url=found[1], name=found[2], token=found[3], trust_sha256=found[4])
        except ValidationError as error:
            raise MalformedMessage(
                "not an enrolment ticket: a part of it is too long, or no address"
            ) from error

    @property
    def address(self) -> tuple[str, int]:
        """Host and TCP port of the API."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 443


class EnrolmentRequest(Schema):
    """What a device sends to `ENROLMENTS_PATH`."""

    v: Literal[1] = PROTOCOL_VERSION
    token: EnrolmentSecret
    request: Annotated[bytes, Field(min_length=64, max_length=2048)]
    """PKCS#10, DER: proves that the device has its key. The name in it is not looked at."""

    @classmethod
    def from_bytes(cls, data: bytes) -> EnrolmentRequest:
        """Parses a request.

        Raises:
            MalformedMessage: it is none of this version.
        """
        return _parsed(cls, data, MAX_REQUEST_BYTES, "an enrolment request")


class EnrolmentAnswer(Schema):
    """What the API answers a device that it lets in."""

    v: Literal[1] = PROTOCOL_VERSION
    bundle: EnrolmentBundle
    time: UnixTime
    """The service's clock: a device without a clock of its own checks the certificates at this time."""

    @classmethod
    def from_bytes(cls, data: bytes) -> EnrolmentAnswer:
        """Parses an answer; `bundle.verify` says whether it holds together.

        Raises:
            MalformedMessage: it is none of this version.
        """
        return _parsed(cls, data, MAX_ANSWER_BYTES, "the answer to an enrolment")


def _parsed(schema: type[T], data: bytes, limit: int, what: str) -> T:
    if len(data) > limit:
        raise MalformedMessage(f"{what} has at most {limit} bytes")
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(f"not {what}: {where}: {first['msg']}") from error


def _by_id(raw_keys: tuple[bytes, ...]) -> dict[str, Ed25519PublicKey]:
    keys = (Ed25519PublicKey.from_public_bytes(raw) for raw in raw_keys)
    return {key_id(key): key for key in keys}
