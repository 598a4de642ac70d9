"""Certificates renewed before they end: who may ask, what is answered, and that no power cut costs one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.adapters import renewal_files
from edge_client.adapters.credentials import Credentials, load_credentials
from edge_client.adapters.renewal_files import RenewalFiles
from edge_client.adapters.tls import TlsFiles
from edge_client.device_setup import enrol, initialise
from edge_client.renewing import FIRST_WAIT_SECONDS, SETTLED_SECONDS, Renewer, Trial
from protocol.enrolment import EnrolmentBundle
from protocol.errors import BadSignature
from protocol.identity import create_ca, issue_certificate, open_request, verify_certificate
from protocol.messages import RenewalAnswer, RenewalRequest
from protocol.renewal import DUE_SHARE, SPREAD_SHARE, Lifetime, ask, check_request

DAY = 86_400
NOW = int(time.time())


@dataclass
class Fleet:
    """A CA, and what it gave to one device."""

    directory: Path
    ca_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    issued: int = 1

    def __post_init__(self) -> None:
        self.ca = create_ca(self.ca_key, "barn", now=NOW - 900 * DAY, days=3650, serial=1)
        request = initialise(self.directory, "barn-1")
        signer = (Ed25519PrivateKey.generate().public_key().public_bytes_raw(),)
        self.bundle = EnrolmentBundle(
            fleet="barn",
            device_id="barn-1",
            certificate=self.certificate(open_request(request)[1], age=600),
            ca=self.ca,
            plan_signers=signer,
            model_signers=signer,
        )
        enrol(self.directory, self.bundle)

    def certificate(self, key: object, age: int = 0, name: str = "barn-1") -> bytes:
        """One of 730 days, issued `age` days ago."""
        self.issued += 1
        return issue_certificate(
            self.ca_key,
            self.ca,
            name,
            key,
            now=NOW - age * DAY,
            days=730,
            serial=self.issued,  # type: ignore[arg-type]
        )

    def answer(self, asked: RenewalRequest) -> RenewalAnswer:
        return RenewalAnswer(
            code="renewed", certificate=self.certificate(open_request(asked.request)[1]), time=NOW
        )


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "barn-1")


def renewer(fleet: Fleet, trial: Callable[[TlsFiles], Trial] = lambda _: Trial.TAKEN) -> Renewer:
    return Renewer(RenewalFiles(fleet.directory), load_credentials(fleet.directory), trial, lambda: 0.5)


def usable(fleet: Fleet) -> Credentials:
    """What the device has after a restart; key, certificate and TLS files belong together."""
    RenewalFiles(fleet.directory).finish()
    found = load_credentials(fleet.directory)
    certificate = verify_certificate(found.bundle.certificate, fleet.ca, now=NOW)
    assert certificate.public_key.public_bytes_raw() == found.identity.public_key().public_bytes_raw()
    pem = x509.load_pem_x509_certificate((fleet.directory / "certificate.pem").read_bytes())
    assert pem == x509.load_der_x509_certificate(found.bundle.certificate)
    return found


# --- when


def test_a_certificate_is_due_after_two_thirds_and_some_chance_that_stays(fleet: Fleet) -> None:
    key = Ed25519PrivateKey.generate().public_key()
    lifetimes = [Lifetime.of(fleet.certificate(key)) for _ in range(40)]
    shares = [(each.due - each.begins) / (each.ends - each.begins) for each in lifetimes]
    assert all(DUE_SHARE <= share <= DUE_SHARE + SPREAD_SHARE for share in shares)
    assert max(shares) - min(shares) > SPREAD_SHARE / 2
    one = fleet.certificate(key)
    assert Lifetime.of(one) == Lifetime.of(one)
    assert not lifetimes[0].is_due(0.0) and lifetimes[0].is_due(lifetimes[0].ends + 10 * 365 * DAY)


def test_it_asks_when_it_is_due_and_again_with_patience(fleet: Fleet) -> None:
    young = renewer(fleet)
    assert young.due(NOW - 590 * DAY, 0.0) is None
    # A clock that stands at the epoch asks for nothing.
    assert young.due(0.0, 0.0) is None
    asks = [second for second in range(0, 4000, 10) if young.due(NOW, float(second)) is not None]
    assert asks[0] == 0 and 3 <= len(asks) <= 8
    assert asks[1] - asks[0] >= FIRST_WAIT_SECONDS * 0.75
    assert asks[2] - asks[1] > asks[1] - asks[0]


# --- who asks


def test_the_request_proves_both_keys_and_nobody_elses(fleet: Fleet) -> None:
    identity, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    asked = ask("barn", "barn-1", fleet.bundle.certificate, identity, new)
    check_request(asked, identity.public_key(), "barn")
    assert open_request(asked.request)[1].public_bytes_raw() == new.public_key().public_bytes_raw()
    for key, name in ((new.public_key(), "barn"), (identity.public_key(), "other")):
        with pytest.raises(BadSignature):
            check_request(asked, key, name)


# --- going over


@pytest.mark.parametrize("new_key", [False, True])
def test_it_goes_over_once_the_broker_takes_the_new_one(fleet: Fleet, new_key: bool) -> None:
    files = RenewalFiles(fleet.directory)
    files.wish(new_key=new_key)
    tried: list[TlsFiles] = []
    one = renewer(fleet, lambda given: (tried.append(given), Trial.TAKEN)[1])
    before = load_credentials(fleet.directory)
    asked = one.due(NOW - 590 * DAY, 0.0)  # by the owner's wish, long before it is due
    assert asked is not None
    one.take(fleet.answer(asked), NOW, 1.0)
    assert load_credentials(fleet.directory).bundle == before.bundle
    after = one.change(2.0)
    assert after is not None and tried
    found = usable(fleet)
    assert found.bundle == after.bundle != before.bundle
    same = found.identity.private_bytes_raw() == before.identity.private_bytes_raw()
    assert same is not new_key
    assert files.outcome() == "renewed" and files.wished() is None
    assert one.due(NOW, 3.0) is None


def test_a_certificate_that_the_broker_refuses_is_not_taken(fleet: Fleet) -> None:
    files = RenewalFiles(fleet.directory)
    files.wish(new_key=True)
    answers = iter([Trial.UNREACHABLE, Trial.REFUSED])
    one = renewer(fleet, lambda _: next(answers))
    asked = one.due(NOW, 0.0)
    assert asked is not None
    one.take(fleet.answer(asked), NOW, 0.0)
    assert one.change(0.0) is None and files.outcome() is None
    assert one.change(FIRST_WAIT_SECONDS + 1) is None
    assert "refuses" in (files.outcome() or "")
    assert usable(fleet).bundle == fleet.bundle
    assert one.due(NOW, SETTLED_SECONDS * 0.5) is None and one.due(NOW, SETTLED_SECONDS * 2) is not None


def test_answers_that_do_not_fit_change_nothing(fleet: Fleet) -> None:
    other = fleet.certificate(Ed25519PrivateKey.generate().public_key())
    foreign = Fleet(fleet.directory.parent / "foreign")
    key = load_credentials(fleet.directory).identity.public_key()
    named = fleet.certificate(key, name="barn-2")
    for certificate in (other, foreign.certificate(key), named, b"\0" * 64):
        one = renewer(fleet)
        assert one.due(NOW, 0.0) is not None
        one.take(RenewalAnswer(code="renewed", certificate=certificate, time=NOW), NOW, 0.0)
        assert one.change(1.0) is None and usable(fleet).bundle == fleet.bundle
    unasked = renewer(fleet)
    unasked.take(RenewalAnswer(code="renewed", certificate=fleet.certificate(key), time=NOW), NOW, 0.0)
    assert unasked.change(1.0) is None


def test_a_service_that_has_no_ca_key_now_is_asked_later(fleet: Fleet) -> None:
    one = renewer(fleet)
    assert one.due(NOW, 0.0) is not None
    one.take(RenewalAnswer(code="ca-offline", detail="elsewhere", again=6 * 3600, time=NOW), NOW, 0.0)
    assert one.due(NOW, 3600.0) is None and one.due(NOW, 8 * 3600.0) is not None


def test_a_clock_that_runs_ahead_gets_the_same_again_and_asks_once_a_day(fleet: Fleet) -> None:
    one = renewer(fleet)
    assert one.due(NOW + 2000 * DAY, 0.0) is not None
    one.take(
        RenewalAnswer(code="renewed", certificate=fleet.bundle.certificate, time=NOW), NOW + 2000 * DAY, 0.0
    )
    asks = [hour for hour in range(1, 72) if one.due(NOW + 2000 * DAY, hour * 3600.0) is not None]
    assert len(asks) >= 1 and asks[0] >= 18
    # The service's clock says whether a new one is valid.
    asked = renewer(fleet).due(NOW + 2000 * DAY, 0.0)
    two = renewer(fleet)
    again = two.due(NOW + 2000 * DAY, 0.0)
    assert asked is not None and again is not None
    two.take(fleet.answer(again), NOW + 2000 * DAY, 0.0)
    assert two.change(0.0) is not None


class PowerCut(Exception):
    """The power is gone."""


@pytest.mark.parametrize("new_key", [False, True])
def test_a_power_cut_at_any_write_leaves_one_whole_pair(tmp_path: Path, new_key: bool) -> None:
    seen = set()
    for step in range(40):
        fleet = Fleet(tmp_path / f"{step}")
        files = RenewalFiles(fleet.directory)
        files.wish(new_key=new_key)
        one = renewer(fleet)
        steps = step

        def cut(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                nonlocal steps
                steps -= 1
                if steps < 0:
                    raise PowerCut
                return real(*arguments)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(renewal_files, "write_durably", cut(renewal_files.write_durably))

            patch.setattr(renewal_files, "sync_directory", cut(renewal_files.sync_directory))
            try:
                asked = one.due(NOW, 0.0)
                assert asked is not None
                one.take(fleet.answer(asked), NOW, 0.0)
                assert one.change(1.0) is not None
                whole = True
            except PowerCut:
                whole = False
        found = usable(fleet)
        seen.add(found.bundle == fleet.bundle)
        # What was left behind does not get in the way of the next attempt.
        next_one = renewer(fleet)
        files.wish(new_key=False)
        asked = next_one.due(NOW, 0.0)
        assert asked is not None
        next_one.take(fleet.answer(asked), NOW, 0.0)
        assert next_one.change(1.0) is not None
        usable(fleet)
        if whole:
            break
    else:
        raise AssertionError("it never got through")
    assert seen == {True, False} and step > 5


def test_a_key_made_for_an_answer_that_never_came_is_used_the_next_time(fleet: Fleet) -> None:
    files = RenewalFiles(fleet.directory)
    files.wish(new_key=True)
    first, second = renewer(fleet).due(NOW, 0.0), renewer(fleet).due(NOW, 0.0)
    assert first is not None and second is not None
    keys = [open_request(each.request)[1].public_bytes_raw() for each in (first, second)]
    assert keys[0] == keys[1]
    assert secrets.compare_digest(first.certificate, fleet.bundle.certificate)
