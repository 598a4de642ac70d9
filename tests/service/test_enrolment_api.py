"""Tickets by the API: who may make them, and what they let in."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.access.roles import Role
from aggregator.adapters import keyfiles
from aggregator.client import ApiError
from aggregator.fleet.authority import Authority
from aggregator.web.enrolment_schemas import EnrolmentTokenRequest, NewEnrolmentToken
from aggregator.web.limit_settings import Limits
from protocol.enrolment import ENROLMENTS_PATH, TRUST_PATH, EnrolmentAnswer, EnrolmentRequest, EnrolmentTicket
from protocol.identity import create_request, verify_certificate
from tests.api_bench import Api, api

WEEK = 7 * 86_400.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path, limits=Limits(failures="1000/minute")) as found:
        # Their tickets end before they do.
        found.tokens = {role: found.token(role, 10 * WEEK) for role in Role}
        yield found


def tickets(bench: Api, who: Role = Role.OPERATOR, **more: Any) -> tuple[NewEnrolmentToken, ...]:
    with bench.client(who) as client:
        return client.make_tickets(EnrolmentTokenRequest(**({"seconds": WEEK, "name": "barn-{n}"} | more)))


def ask(
    bench: Api, made: NewEnrolmentToken, key: Ed25519PrivateKey, *, asks_for: str = "covey.aggregator"
) -> httpx.Response:
    """A device's request; whatever name it asks for."""
    token = EnrolmentTicket.from_text(made.ticket).token
    request = EnrolmentRequest(token=token, request=create_request(key, asks_for))
    return bench.call("POST", ENROLMENTS_PATH, None, content=request.model_dump_json())


def code(response: httpx.Response) -> str:
    return str(response.json()["code"])


def test_a_ticket_lets_one_device_in_under_the_recorded_name(bench: Api) -> None:
    (made,) = tickets(bench, labels=("site=barn", "a"))
    ticket = EnrolmentTicket.from_text(made.ticket)
    assert (ticket.url, ticket.name, made.status) == ("https://hub.example:8443", "barn-1", "open")
    key = Ed25519PrivateKey.generate()
    response = ask(bench, made, key)
    assert response.status_code == 201 and response.headers["Cache-Control"] == "no-store"
    answer = EnrolmentAnswer.from_bytes(response.content)
    bundle, now = answer.bundle, int(bench.clock.moment().unix)
    assert answer.time == now
    # The name is the one that was recorded with the token; what the request asked for does not matter.
    assert verify_certificate(bundle.certificate, bundle.ca, now=now).device_id == "barn-1"
    assert (bundle.device_id, bundle.fleet, bundle.broker) == (
        "barn-1",
        "orchard",
        "mqtts://hub.example:8883",
    )
    certificate = x509.load_der_x509_certificate(bundle.certificate)
    assert certificate.public_key() == key.public_key()
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with bench.client(Role.VIEWER) as client:
        device = client.device("barn-1")
        assert (device.labels, device.token, device.enrolled_at) == (("a", "site=barn"), made.token, now)
        (issued,) = client.certificates("barn-1")
        assert int(issued.serial, 16) == certificate.serial_number and issued.revoked_at is None
    with bench.client(Role.OPERATOR) as client:
        (used,) = client.enrolment_tokens()
    assert (used.status, used.used_at) == ("used", now)


def test_the_trust_of_a_ticket_is_what_anybody_may_fetch(bench: Api) -> None:
    (made,) = tickets(bench)
    response = bench.call("GET", TRUST_PATH, None)
    digest = hashlib.sha256(response.content).hexdigest()
    assert digest == EnrolmentTicket.from_text(made.ticket).trust_sha256
    assert response.content == bench.context.operator.authority.ca


def test_only_a_hash_of_a_token_is_kept(bench: Api, tmp_path: Path) -> None:
    made = tickets(bench, amount=3)
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("aggregator.db*"))
    for each in made:
        secret = EnrolmentTicket.from_text(each.ticket).token.partition("_")[2]
        assert each.token.encode() in stored
        assert secret.encode() not in stored and bytes.fromhex(secret) not in stored
        assert hashlib.sha256(bytes.fromhex(secret)).digest() in stored


def test_the_same_key_gets_the_same_certificate_and_another_key_none(bench: Api) -> None:
    (made,) = tickets(bench)
    key = Ed25519PrivateKey.generate()
    first = ask(bench, made, key)
    bench.clock.now += 3600
    again, other = ask(bench, made, key), ask(bench, made, Ed25519PrivateKey.generate())
    assert (first.json()["bundle"], again.status_code) == (again.json()["bundle"], 201)
    assert (other.status_code, code(other)) == (409, "token-used")
    with bench.client() as client:
        assert len(client.certificates("barn-1")) == 1
    bench.clock.now += WEEK
    late = ask(bench, made, key)
    assert (late.status_code, code(late)) == (410, "token-expired")


def test_expired_revoked_and_made_up_tickets_let_nobody_in(bench: Api) -> None:
    expired, revoked, forged = tickets(bench, amount=3, seconds=3600)
    with bench.client(Role.OPERATOR) as client:
        assert client.revoke_enrolment_token(revoked.token).status == "revoked"
        with pytest.raises(ApiError) as missing:
            client.revoke_enrolment_token("0" * 12)
        assert missing.value.code == "not-found"
    key = Ed25519PrivateKey.generate()
    assert code(ask(bench, revoked, key)) == "token-revoked"
    secret = EnrolmentTicket.from_text(forged.ticket).token.partition("_")[2]
    fake = forged.model_copy(update={"ticket": forged.ticket.replace(secret, "0" * 64)})
    unknown = forged.model_copy(update={"ticket": forged.ticket.replace(forged.token, "0" * 12)})
    assert code(ask(bench, fake, key)) == code(ask(bench, unknown, key)) == "token-unknown"
    bench.clock.now += 3600
    assert code(ask(bench, expired, key)) == "token-expired"
    with bench.client() as client:
        assert list(client.devices()) == []
        # Who shows no token of this fleet leaves no trace, or they could fill the disk.
        seen = [(e.who, e.target, e.outcome) for e in client.audit_log().items if e.role == "device"]
    assert seen == [
        (f"ticket:{expired.token}", "barn-1", "token-expired"),
        (f"ticket:{revoked.token}", "barn-2", "token-revoked"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"{" * 4000,
        json.dumps({"token": "0" * 77, "request": "AAAA"}).encode(),
        json.dumps({"v": 1, "token": "0" * 12 + "_" + "0" * 64, "request": "A" * 88, "more": 1}).encode(),
    ],
)
def test_what_is_no_request_is_refused(bench: Api, content: bytes) -> None:
    response = bench.call("POST", ENROLMENTS_PATH, None, content=content)
    assert (response.status_code, code(response)) == (422, "invalid-request")


def test_the_specification_bounds_the_request_as_the_check_does(bench: Api) -> None:
    document = bench.app.openapi()
    body = document["paths"][ENROLMENTS_PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    declared = body["properties"]["request"]
    for size in (63, 64, 65, 66, 2047, 2048, 2049, 2050):
        padded = base64.urlsafe_b64encode(bytes(size)).decode()
        for text in {padded, padded.rstrip("=")}:
            within = declared["minLength"] <= len(text) <= declared["maxLength"]
            asked = {"token": f"{'0' * 12}_{'0' * 64}", "request": text}
            answer = bench.call("POST", ENROLMENTS_PATH, who=None, json=asked)
            if 64 <= size <= 2048:
                # The right length, and no signing request.
                assert within and code(answer) == "enrolment-refused"
            else:
                # 2,049 bytes without padding are as long as 2,048 with it: no length tells them apart.
                assert within == (len(text) == 2732) and code(answer) == "invalid-request"


def test_a_request_that_is_too_large_is_not_read(bench: Api) -> None:
    response = bench.call("POST", ENROLMENTS_PATH, None, content=b" " * 20_000)
    assert (response.status_code, code(response)) == (413, "too-large")


def test_a_request_without_proof_of_possession_leaves_the_token_good(bench: Api) -> None:
    (made,) = tickets(bench)
    key = Ed25519PrivateKey.generate()
    token = EnrolmentTicket.from_text(made.ticket).token
    request = bytearray(create_request(key, "barn-1"))
    request[-1] ^= 1
    broken = EnrolmentRequest(token=token, request=bytes(request)).model_dump_json()
    response = bench.call("POST", ENROLMENTS_PATH, None, content=broken)
    assert (response.status_code, code(response)) == (422, "enrolment-refused")
    assert ask(bench, made, key).status_code == 201


def test_guessing_is_limited_by_address(tmp_path: Path) -> None:
    with api(tmp_path, limits=Limits(failures="3/minute")) as bench:
        (made,) = tickets(bench)
        forged = made.model_copy(update={"ticket": made.ticket.replace(made.token, "0" * 12)})
        key = Ed25519PrivateKey.generate()
        codes = [code(ask(bench, forged, key)) for _ in range(4)]
        assert codes == ["token-unknown"] * 3 + ["rate-limited"]
        assert code(ask(bench, made, key)) == "rate-limited"
    with api(tmp_path / "other", limits=Limits(enrolments="2/minute")) as bench:
        answers = [bench.call("GET", TRUST_PATH, None).status_code for _ in range(3)]
    assert answers == [200, 200, 429]


def test_while_the_key_of_the_ca_is_away_nobody_is_enrolled_and_tickets_stay_good(tmp_path: Path) -> None:
    with api(tmp_path, limits=Limits(failures="1/minute")) as bench:
        (made,) = tickets(bench)
        ca_key, vault = tmp_path / "keys" / "ca-key.pem", tmp_path / "vault.pem"
        ca_key.rename(vault)
        key = Ed25519PrivateKey.generate()
        for _ in range(3):
            response = ask(bench, made, key)
            assert (response.status_code, code(response)) == (503, "enrolment-closed")
            assert "Retry-After" in response.headers
        vault.rename(ca_key)
        answer = ask(bench, made, key)
        assert answer.status_code == 201
        ca_key.unlink()
        # What was issued can be said again without the key.
        assert ask(bench, made, key).json()["bundle"] == answer.json()["bundle"]


def test_the_key_of_the_ca_is_not_read_for_who_has_no_ticket(bench: Api) -> None:
    read: list[int] = []
    inner = bench.context.enrolling

    def enrolling() -> Authority:
        read.append(1)
        return inner()

    object.__setattr__(bench.context, "enrolling", enrolling)
    (made,) = tickets(bench)
    forged = made.model_copy(update={"ticket": made.ticket.replace(made.token, "0" * 12)})
    assert code(ask(bench, forged, Ed25519PrivateKey.generate())) == "token-unknown" and not read
    assert ask(bench, made, Ed25519PrivateKey.generate()).status_code == 201 and read
    assert code(ask(bench, made, Ed25519PrivateKey.generate())) == "token-used" and len(read) == 1


def test_the_key_of_the_ca_may_lie_elsewhere(bench: Api, tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    elsewhere = tmp_path / "stick" / "ca-key.pem"
    (tmp_path / "keys" / "ca-key.pem").rename(elsewhere)
    assert keyfiles.load(tmp_path / "keys").ca_key is None
    assert keyfiles.load(tmp_path / "keys", elsewhere).ca_key is not None


# --- names


def test_numbers_go_past_names_that_are_taken(bench: Api) -> None:
    first = tickets(bench, amount=2)
    assert ask(bench, first[0], Ed25519PrivateKey.generate()).status_code == 201
    second = tickets(bench, amount=2)
    assert [each.name for each in second] == ["barn-3", "barn-4"]
    assert [each.name for each in tickets(bench, first=3)] == ["barn-5"]
    # An expired ticket keeps no name from others.
    bench.clock.now += WEEK
    assert [each.name for each in tickets(bench, first=2)] == ["barn-2"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"amount": 2, "name": "barn"}, "need {n}"),
        ({"name": "barn-0"}, "open ticket"),
        ({"name": "{barn}"}, "no device id"),
        ({"name": "b" * 62 + "{n}"[:1]}, "no device id"),
    ],
)
def test_names_that_cannot_be_given_are_refused(bench: Api, asked: dict[str, Any], why: str) -> None:
    tickets(bench, name="barn-0")
    with pytest.raises(ApiError, match=why):
        tickets(bench, **asked)


def test_a_new_device_takes_the_place_of_an_enrolled_one_only_when_the_operator_says_so(bench: Api) -> None:
    (made,) = tickets(bench, name="barn-1", labels=("old",))
    old = Ed25519PrivateKey.generate()
    assert ask(bench, made, old).status_code == 201
    with pytest.raises(ApiError, match="--replace"):
        tickets(bench, name="barn-1")
    bench.clock.now += 60
    (new,) = tickets(bench, name="barn-1", replaces=True)
    key = Ed25519PrivateKey.generate()
    assert ask(bench, new, key).status_code == 201
    assert code(ask(bench, made, old)) == "token-used"
    with bench.client() as client:
        device, certificates = client.device("barn-1"), client.certificates("barn-1")
    assert (device.token, device.labels) == (new.token, ("old",))
    # Both were issued at one instant of the test's clock, so that either may come first.
    assert {each.reason for each in certificates} == {"another device took its place", ""}
    assert len(certificates) == 2


def test_a_device_that_was_sent_away_does_not_come_back_by_an_old_ticket(bench: Api) -> None:
    (made,) = tickets(bench, name="barn-1")
    key = Ed25519PrivateKey.generate()
    assert ask(bench, made, key).status_code == 201
    with bench.context.operator.repository.write() as writer:
        writer.set_device_state("barn-1", "revoked")
    assert code(ask(bench, made, key)) == "token-revoked"
    (new,) = tickets(bench, name="barn-1", replaces=True)
    assert ask(bench, new, key).status_code == 201
    with bench.client() as client:
        assert client.device("barn-1").state == "active"


def test_a_ticket_whose_name_was_taken_meanwhile_leaves_a_trace(bench: Api) -> None:
    (made,) = tickets(bench, name="barn-1")
    by_hand = replace(bench.context.operator, authority=bench.context.enrolling())
    by_hand.enrol(create_request(Ed25519PrivateKey.generate(), "barn-1"))
    refused = ask(bench, made, Ed25519PrivateKey.generate())
    assert code(refused) == "enrolment-refused" and "enrolled with another key" in refused.json()["detail"]
    with bench.client() as client:
        entry = client.audit_log().items[0]
    assert (entry.who, entry.role) == (f"ticket:{made.token}", "device")
    assert (entry.action, entry.target, entry.outcome) == ("enrol-by-ticket", "barn-1", "enrolment-refused")


# --- who may


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/enrolment-tokens"),
        ("GET", "/api/v1/enrolment-tokens"),
        ("DELETE", "/api/v1/enrolment-tokens/" + "0" * 12),
    ],
)
def test_tickets_are_for_operators(bench: Api, method: str, path: str) -> None:
    assert code(bench.call(method, path, None)) == "unauthenticated"
    assert code(bench.call(method, path, Role.VIEWER)) == "forbidden"


def test_making_tickets_leaves_a_trace_without_them(bench: Api) -> None:
    made = tickets(bench, amount=2)
    with bench.client() as client:
        entry = client.audit_log().items[0]
    assert (entry.action, entry.target, entry.outcome) == ("make-enrolment-tokens", "2 of barn-{n}", "done")
    assert made[0].ticket not in repr(made[0])


def test_without_an_address_or_a_trust_there_are_no_tickets(bench: Api) -> None:
    def through(**changes: Any) -> None:
        operator = bench.context.operator
        doorway = replace(operator.doorway, **changes)
        object.__setattr__(bench.context, "operator", replace(operator, doorway=doorway))

    through(url=None)
    with pytest.raises(ApiError, match="--url"):
        tickets(bench)
    (made,) = tickets(bench, url="https://[2001:db8::1]:8443")
    assert EnrolmentTicket.from_text(made.ticket).address == ("2001:db8::1", 8443)
    with bench.client() as client, pytest.raises(ApiError) as plain:
        client.make_tickets(
            EnrolmentTokenRequest.model_construct(
                amount=1, name="a", first=1, labels=(), seconds=60.0, replaces=False, url="http://hub.example"
            )
        )
    assert plain.value.code == "invalid-request"
    through(trust=None)
    with pytest.raises(ApiError, match="api_ca"):
        tickets(bench, url="https://hub.example")
    assert bench.call("GET", TRUST_PATH, None).status_code == 404
