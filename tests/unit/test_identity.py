"""Certificates, signing requests, signed documents and topics."""

from __future__ import annotations

import pytest

from protocol import topics
from protocol.errors import BadSignature
from protocol.identity import (
    SignedDocument,
    create_ca,
    create_request,
    issue_certificate,
    key_id,
    open_request,
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
