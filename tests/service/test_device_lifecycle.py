"""Devices that are revoked, retired and moved: operations, API, console, service, and the broker's list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from aggregator.access.roles import Role
from aggregator.client import ApiError
from aggregator.fleet.authority import Authority, EnrolmentRefused
from aggregator.fleet.revocation import revocation_list
from aggregator.records import IssuedCertificate
from aggregator.revoked_list import AGAIN_SECONDS, SETTLE_SECONDS, RevokedList
from aggregator.settings import CampaignRequest
from protocol import topics
from tests.aggregator_bench import Bench
from tests.api_bench import Api, api, csr
from tests.service.test_console import page, sign_in


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        with found.client() as client:
            for name in ("barn-1", "barn-2"):
                client.enrol(csr(name))
        yield found


# --- operations, over the API


def test_a_revoked_device_loses_its_certificates_and_says_why(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        assert client.revoke_device("barn-1", "stolen").state == "revoked"
        (certificate,) = client.certificates("barn-1")
        assert certificate.revoked_at is not None and certificate.reason == "stolen"
        assert client.device("barn-2").state == "active"
        assert client.certificates("barn-2")[0].revoked_at is None
        for act in (
            lambda: client.revoke_device("barn-1", "again"),
            lambda: client.retire_device("barn-1"),
            lambda: client.move_device("barn-1", ("site=south",)),
        ):
            with pytest.raises(ApiError, match="barn-1 is revoked") as caught:
                act()
            assert caught.value.code == "refused"
        # Its own signing request does not let it in again.
        with pytest.raises(ApiError):
            client.enrol(csr("barn-1"))
    with bench.context.operator.repository.read() as reader:
        assert reader.active_devices() == {"barn-2"}
        assert reader.fleet_size().enrolled == 1


def test_a_retired_device_may_turn_out_to_be_stolen(bench: Api) -> None:
    with bench.client() as client:
        assert client.retire_device("barn-1").state == "retired"
        assert client.revoke_device("barn-1", "stolen from the store").state == "revoked"
        # The first reason stays with the certificate: it was no good from then on.
        assert client.certificates("barn-1")[0].reason == "retired"


def test_a_move_takes_the_place_of_what_says_otherwise(bench: Api) -> None:
    with bench.client() as client:
        client.label("barn-1", ("barn", "site=north", "row=3"))
        moved = client.move_device("barn-1", ("site=south", "cold"))
        assert moved.labels == ("barn", "cold", "row=3", "site=south")
        assert client.device("barn-1").labels == moved.labels


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "revocation", {"reason": "x"}),
        ("PUT", "retirement", None),
        ("POST", "place", {"labels": ["a=b"]}),
    ],
)
def test_only_operators_may_and_all_is_in_the_audit_log(
    bench: Api, method: str, path: str, body: object
) -> None:
    where = f"/api/v1/devices/barn-1/{path}"
    assert bench.call(method, where, Role.VIEWER, json=body).status_code == 403
    assert bench.call(method, where, Role.OPERATOR, json=body).status_code == 200
    assert bench.call(method, where.replace("barn-1", "barn-9"), Role.OPERATOR, json=body).status_code == 404
    with bench.client() as client:
        done, refused = client.audit_log().items[1], client.audit_log().items[2]
    action = {"revocation": "revoke-device", "retirement": "retire-device", "place": "move-device"}[path]
    assert (done.action, done.target, done.outcome) == (action, "barn-1", "done")
    assert (refused.action, refused.outcome) == (action, "forbidden")


def test_the_console_asks_and_then_does_it(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    shown = page(bench, "/fleet/barn-1", browser)
    assert "/fleet/barn-1/revoke" in shown and "/fleet/barn-1/retire" in shown
    asks = page(bench, "/fleet/barn-1/revoke", browser)
    assert "Revoke barn-1?" in asks and "within seconds" in asks
    with bench.client() as client:
        assert client.device("barn-1").state == "active"
    done = bench.call("POST", "/fleet/barn-1/revoke", None, data={"reason": "stolen"}, headers=browser)
    assert (done.status_code, done.headers["location"]) == (303, "/fleet/barn-1")
    shown = page(bench, "/fleet/barn-1", browser)
    assert "revoked" in shown and "/fleet/barn-1/revoke" not in shown
    assert "Retire barn-2?" in page(bench, "/fleet/barn-2/retire", browser)
    bench.call("POST", "/fleet/barn-2/retire", None, headers=browser)
    with bench.client() as client:
        assert [client.device(name).state for name in ("barn-1", "barn-2")] == ["revoked", "retired"]
    viewer = sign_in(bench, Role.VIEWER)
    assert "/revoke" not in page(bench, "/fleet/barn-2", viewer)
    assert "needs the role operator" in page(bench, "/fleet/barn-2/revoke", viewer, 403)


# --- in rounds


def test_a_round_takes_a_revoked_device_for_a_dropout_and_no_other_asks_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=5)
    try:
        campaign = bench.start(CampaignRequest("toy", rounds=2, cohort=5, minimum=3, min_survivors=3))
        # It checks in, and is revoked before anything else comes of it.
        spoken = 0

        def silent(message):  # type: ignore[no-untyped-def]
            nonlocal spoken
            if message[0] != topics.up("device-0", "msg"):
                return [message]
            spoken += 1
            return [message] if spoken == 1 else []

        bench.filter = silent
        bench.run_until(lambda: spoken >= 1)
        bench.operator.revoke("device-0", "stolen")
        first, second = bench.finish(campaign)
        assert "device-0" in first.record.invited and "device-0" not in first.report.survivors
        assert (first.record.status, second.record.status) == ("completed", "completed")
        assert "device-0" not in second.record.invited
        assert not bench.operator.device("device-0").online
    finally:
        bench.close()


def test_what_a_revoked_device_says_or_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=2)
    try:
        bench.run_until(lambda: bench.operator.device("device-0").online)
        bench.operator.retire("device-0")
        bench.run_until(lambda: not bench.operator.device("device-0").online)
        bench.deliver(bench.devices["device-0"].birth())
        bench.run_until(lambda: bench.operator.device("device-1").online)
        for _ in range(20):
            bench.service.step(0)
        assert not bench.operator.device("device-0").online
        # What it may have left retained is cleared, or it would come again with every connection.
        everything = {topics.up("device-0", channel): b"" for channel in ("status", "msg", "chunk")}
        assert {topic: each for topic, each in bench.transport.retained.items() if not each} == everything
        # Also when it is nothing that a device says.
        bench.transport.retained.clear()
        bench.deliver((topics.up("device-0", "chunk"), b"left behind"))
        bench.service.step(0)
        assert bench.transport.retained == everything
    finally:
        bench.close()


# --- the list


def _certificate(serial: str, device: str, *, expires: float = 2000.0) -> IssuedCertificate:
    return IssuedCertificate(serial, device, 0.0, expires, revoked_at=1000.0, reason="x")


def test_the_list_is_the_cas_and_names_what_has_not_expired() -> None:
    authority = Authority.create("orchard", now=0, serial=1)
    revoked = (_certificate("ab1", "a"), _certificate("c", "b", expires=1400.0))
    listed = x509.load_pem_x509_crl(revocation_list(authority, revoked, now=1500.0))
    ca = x509.load_der_x509_certificate(authority.ca)
    assert listed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    assert [each.serial_number for each in listed] == [0xAB1]
    assert listed.issuer == ca.subject and listed.next_update_utc == ca.not_valid_after_utc
    offline = Authority(authority.ca, None, authority.operator_key)
    with pytest.raises(EnrolmentRefused, match="kept elsewhere"):
        revocation_list(offline, (), now=0.0)


def test_who_lost_a_certificate_and_stays_is_sent_away_once_the_broker_knows_it() -> None:
    written: list[int] = []
    keeper = RevokedList(lambda revoked: written.append(len(revoked)) is None)
    members = frozenset({"a", "b"})
    # What was revoked before is no news.
    assert keeper.tick((_certificate("1", "a"),), members, 0.0) == frozenset()
    both = (_certificate("1", "a"), _certificate("2", "b"), _certificate("3", "gone"))
    assert keeper.tick(both, members, 1.0) == frozenset()
    assert keeper.tick(both, members, 1.0 + SETTLE_SECONDS / 2) == frozenset()
    assert keeper.tick(both, members, 1.0 + SETTLE_SECONDS) == {"b"}
    assert keeper.tick(both, members, 99.0) == frozenset()
    assert written == [1, 3]


def test_a_list_that_cannot_be_signed_now_is_written_later() -> None:
    there, tries = False, 0

    def write(_: object) -> bool:
        nonlocal tries
        tries += 1
        return there

    keeper, revoked = RevokedList(write), (_certificate("1", "a"),)
    for clock in range(10):
        keeper.tick(revoked, frozenset(), float(clock))
    assert tries == 1
    there = True
    keeper.tick(revoked, frozenset(), AGAIN_SECONDS)
    keeper.tick(revoked, frozenset(), AGAIN_SECONDS + 1)
    assert tries == 2
