"""Enrolment tickets, requests and answers, and the rule of an enrolment token."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from aggregator.fleet.enrolment import TokenRefused, check_token, make_enrolment_token
from protocol.enrolment import EnrolmentAnswer, EnrolmentRequest, EnrolmentTicket
from protocol.errors import MalformedMessage
from tests.edge_fleet import NOW, bundle

TICKET = EnrolmentTicket(
    url="https://hub.example:8443",
    name="barn-1",
    token="0123456789ab_" + "cd" * 32,
    trust_sha256="ef" * 32,
)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://hub.example:8443", ("hub.example", 8443)),
        ("https://192.0.2.1", ("192.0.2.1", 443)),
        ("https://[2001:db8::1]:8443", ("2001:db8::1", 8443)),
    ],
)
def test_a_ticket_survives_its_line(url: str, address: tuple[str, int]) -> None:
    ticket = TICKET.model_copy(update={"url": url})
    assert EnrolmentTicket.from_text(f"  {ticket.to_text()}\n") == ticket
    assert ticket.address == address


def test_a_ticket_does_not_show_its_token() -> None:
    assert TICKET.token not in repr(TICKET)
    assert TICKET.token not in repr(EnrolmentRequest(token=TICKET.token, request=bytes(64)))


@pytest.mark.parametrize(
    "change",
    [
        ("https", "http"),
        ("hub.example", ""),
        ("hub.example", "user@hub.example"),
        ("/barn-1", ""),
        ("/barn-1", "/Barn 1"),
        ("/barn-1", "/" + "b" * 64),
        ("cdcd", "cd"),
        ("efef", "EFEF"),
        ("#", "?"),
        ("hub.example", "h" * 300),
        ("covey+", ""),
        ("#", "#\n"),
        (":8443", ":8443/api"),
        (":8443", ":99999"),
        (":8443", ":0"),
        ("hub.example", "[::1:]"),
        ("hub.example", "hub..example"),
    ],
)
def test_what_is_no_ticket_is_refused_and_not_repeated(change: tuple[str, str]) -> None:
    text = TICKET.to_text().replace(*change, 1)
    with pytest.raises(MalformedMessage, match="ticket") as refused:
        EnrolmentTicket.from_text(text)
    assert "cdcd" not in str(refused.value)
    with pytest.raises(MalformedMessage, match="at most"):
        EnrolmentTicket.from_text(TICKET.to_text() + " " * 2_000)


def test_requests_and_answers_are_strict_and_bounded() -> None:
    request = EnrolmentRequest(token=TICKET.token, request=bytes(64))
    assert EnrolmentRequest.from_bytes(request.model_dump_json().encode()) == request
    for change in ({"extra": 1}, {"v": 2}, {"token": "0" * 77}, {"request": ""}, {"request": "!"}):
        with pytest.raises(MalformedMessage):
            EnrolmentRequest.from_bytes(json.dumps(request.model_dump(mode="json") | change).encode())
    with pytest.raises(MalformedMessage, match="at most"):
        EnrolmentRequest.from_bytes(b" " * 10_000)
    answer = EnrolmentAnswer(bundle=bundle("barn-1"), time=NOW)
    assert EnrolmentAnswer.from_bytes(answer.model_dump_json().encode()) == answer
    with pytest.raises(MalformedMessage):
        EnrolmentAnswer.from_bytes(b"{}")


def test_a_token_lets_one_key_in_until_it_expires() -> None:
    token, record = make_enrolment_token(
        bytes(range(38)), name="barn-1", labels=("b", "a", "b"), replaces=False, now=100.0, seconds=60.0,
        created_by="test",
    )  # fmt: skip
    assert record.labels == ("a", "b") and bytes.fromhex(token.split("_")[1]) not in record.secret_sha256
    assert token not in repr(record) and "secret_sha256" not in repr(record)
    used = replace(record, used_at=101.0, key_id="a" * 64)
    assert check_token(token, record, "a" * 64, 159.0) is record
    assert check_token(token, used, "a" * 64, 159.0) is used
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    for code, given, known, key, now in (
        ("token-unknown", token, None, "a", 101.0),
        ("token-unknown", wrong, record, "a", 101.0),
        # Who has not the secret does not learn what became of the token.
        ("token-unknown", wrong, used, "a", 101.0),
        ("token-unknown", wrong, replace(record, revoked_at=1.0), "a", 999.0),
        ("token-used", token, used, "b", 101.0),
        ("token-expired", token, record, "a", 160.0),
        ("token-expired", token, used, "a", 160.0),
        ("token-revoked", token, replace(used, revoked_at=102.0), "a", 103.0),
    ):
        with pytest.raises(TokenRefused) as refused:
            check_token(given, known, key * 64, now)
        assert refused.value.code == code
