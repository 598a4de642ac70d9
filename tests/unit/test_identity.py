"""Certificates, signing requests, signed documents and topics."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from protocol import topics
from protocol.errors import BadSignature
from protocol.identity import (
    SignedDocument,
    create_ca,
    create_request,
    issue,
    issue_certificate,
    key_id,
    open_request,
    sign,
    verify,
    verify_certificate,
)
from tests.secagg_round import CA, CA_KEY, NOW, certificate, identity

KEY = identity("operator")


def test_a_certificate_names_its_device_and_key() -> None:
    verified = verify_certificate(certificate("barn-1"), CA, now=NOW)
    assert verified.device_id == "barn-1"
    assert key_id(verified.public_key) == key_id(identity("barn-1").public_key())


@pytest.mark.parametrize("now", [NOW - 7200, NOW + 366 * 86_400])
def test_a_certificate_outside_its_time_is_refused(now: int) -> None:
    with pytest.raises(BadSignature, match="clock"):
        verify_certificate(certificate("barn-1"), CA, now=now)


def test_certificates_of_others_are_refused() -> None:
    other = create_ca(KEY, "orchard", now=NOW, days=1, serial=3)
    with pytest.raises(BadSignature):
        verify_certificate(certificate("barn-1"), other, now=NOW)
    with pytest.raises(BadSignature):
        verify_certificate(CA, CA, now=NOW)  # the CA is no device
    with pytest.raises(BadSignature):
        verify_certificate(b"\x30\x03garbage", CA, now=NOW)


def test_a_certificate_that_names_another_issuer_is_refused() -> None:
    renamed = create_ca(CA_KEY, "vineyard", now=NOW, days=1, serial=3)
    with pytest.raises(BadSignature, match="did not sign it"):
        verify_certificate(certificate("barn-1"), renamed, now=NOW)


def test_a_certificate_that_was_changed_is_refused() -> None:
    whole = certificate("barn-1")
    for changed in (whole.replace(b"barn-1", b"barn-2"), whole[:-1] + bytes([whole[-1] ^ 1])):
        with pytest.raises(BadSignature, match="did not sign it"):
            verify_certificate(changed, CA, now=NOW)


def test_a_certificate_has_its_time_with_it() -> None:
    verified = verify_certificate(certificate("barn-1"), CA, now=NOW)
    verified.check_time(verified.not_before)
    verified.check_time(verified.not_after)
    for wrong in (verified.not_before - 1, verified.not_after + 1):
        with pytest.raises(BadSignature, match="clock"):
            verified.check_time(wrong)


IDENTITY_POINT = bytes([1, *bytes(31)])
ORDER = 2**252 + 27742317777372353535851937790883648493


def test_a_signature_is_exactly_one() -> None:
    """Its bytes stand in front of what is signed: none of them may pass for the other."""
    signature = sign(KEY, "note", b"text")
    verify(KEY.public_key(), "note", b"text", signature)
    for wrong in (signature[:-1], signature + b"c", b"", signature + signature, bytes(64)):
        with pytest.raises(BadSignature):
            verify(KEY.public_key(), "note", b"text", wrong)
    for kind, payload in (("note", b"texts"), ("notes", b"text"), ("not", b"etext")):
        with pytest.raises(BadSignature):
            verify(KEY.public_key(), kind, payload, signature)


def test_a_key_of_small_order_signs_nothing() -> None:
    """Under it one signature is good for every message, for verifiers that take it."""
    key = Ed25519PublicKey.from_public_bytes(IDENTITY_POINT)
    key.verify(IDENTITY_POINT + bytes(32), b"anything")  # OpenSSL takes it
    with pytest.raises(BadSignature):
        verify(key, "note", b"text", IDENTITY_POINT + bytes(32))


def test_a_nonce_of_small_order_signs_nothing() -> None:
    """Who owns the key can make it: were it taken by some, they would be set against the others."""
    public, seed = KEY.public_key().public_bytes_raw(), KEY.private_bytes_raw()
    scalar = int.from_bytes(hashlib.sha512(seed).digest()[:32], "little")
    scalar = (scalar & ~7 & (2**254 - 1)) | 2**254
    content = b"covey/v1/signature/\x00\x04notetext"
    challenge = int.from_bytes(hashlib.sha512(IDENTITY_POINT + public + content).digest(), "little")
    signature = IDENTITY_POINT + (challenge * scalar % ORDER).to_bytes(32, "little")
    KEY.public_key().verify(signature, content)  # OpenSSL takes it
    with pytest.raises(BadSignature):
        verify(KEY.public_key(), "note", b"text", signature)


def test_a_certificate_of_no_known_version_is_refused() -> None:
    """The parser has errors of its own for some malformed certificates, which are no ValueErrors."""
    changed = certificate("barn-1").replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107"))
    with pytest.raises(BadSignature):
        verify_certificate(changed, CA, now=NOW)


def test_a_device_cannot_issue_certificates() -> None:
    device = identity("barn-1")
    forged = issue_certificate(
        device, certificate("barn-1"), "barn-2", device.public_key(), now=NOW, days=1, serial=9
    )
    with pytest.raises(BadSignature):
        verify_certificate(forged, CA, now=NOW)


@pytest.mark.parametrize("name", ["Barn 1", "../x", "a/b", "", "+", "x" * 64])
def test_only_safe_names_get_a_certificate(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        issue_certificate(CA_KEY, CA, name, KEY.public_key(), now=NOW, days=1, serial=4)


def test_a_request_proves_possession() -> None:
    request = create_request(KEY, "barn-7")
    name, public = open_request(request)
    assert (name, key_id(public)) == ("barn-7", key_id(KEY.public_key()))
    damaged = request[:-1] + bytes([request[-1] ^ 1])
    for wrong in (damaged, b"", b"nonsense"):
        with pytest.raises(BadSignature):
            open_request(wrong)


def test_a_document_opens_only_as_signed() -> None:
    signers = {key_id(KEY.public_key()): KEY.public_key()}
    document = SignedDocument.create(KEY, "plan", b"payload")
    assert document.open("plan", signers) == b"payload"
    with pytest.raises(BadSignature, match="not a model-manifest"):
        document.open("model-manifest", signers)
    with pytest.raises(BadSignature, match="unknown key"):
        document.open("plan", {})
    for change in ({"payload": b"other"}, {"kind": "model-manifest"}):
        changed = document.model_copy(update=change)
        with pytest.raises(BadSignature, match="does not verify"):
            changed.open(changed.kind, signers)


def test_topics_name_their_device() -> None:
    assert topics.parse_up(topics.up("barn-1", "chunk")) == ("barn-1", "chunk")
    for wrong in ("covey/v1/dev/Barn/up/msg", "covey/v1/dev/a/up/msg/x", "covey/v1/dev/a/down/msg", "a\n"):
        assert topics.parse_up(wrong) is None


def test_a_strict_verifier_takes_the_fleets_certificates(tmp_path: Path) -> None:
    """Python's own TLS contexts are strict from 3.13 on."""
    now = int(time.time())
    ca = create_ca(CA_KEY, "orchard", now=now, days=9, serial=5)
    key = ec.generate_private_key(ec.SECP256R1())
    server = issue(
        CA_KEY,
        ca,
        "hub",
        key.public_key(),
        ExtendedKeyUsageOID.SERVER_AUTH,
        now=now,
        days=9,
        serial=7,
        names=[x509.DNSName("hub.example")],
    )
    pem = serialization.Encoding.PEM
    unencrypted = serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted)
    (tmp_path / "server.pem").write_bytes(private + server.public_bytes(pem))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "server.pem")
    asking = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(ca))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server, server_hostname="hub.example")
    host = serving.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, host):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert client.version() == "TLSv1.3"


def test_a_request_with_a_key_of_small_order_proves_nothing() -> None:
    """Under the neutral element, R = A and S = 0 verify by OpenSSL for every message."""
    key = Ed25519PrivateKey.generate()
    neutral = bytes([1]) + bytes(31)
    request = create_request(key, "barn-1").replace(key.public_key().public_bytes_raw(), neutral)
    with pytest.raises(BadSignature, match="possession"):
        open_request(request[:-64] + neutral + bytes(32))
