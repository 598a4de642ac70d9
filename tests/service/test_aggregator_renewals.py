"""What devices are answered that ask for a new certificate, over the service's own messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

pytest.importorskip("sqlalchemy")

from aggregator.fleet.authority import DEVICE_DAYS
from protocol import topics
from protocol.codec import decode_to_device, encode
from protocol.identity import verify_certificate
from protocol.messages import RenewalAnswer, RenewalRequest
from protocol.renewal import ask
from tests.aggregator_bench import Bench

LATE = DEVICE_DAYS * 86_400 * 0.7


class Renewing(Bench):
    """A service with two devices, whose CA key may be put elsewhere."""

    offline = False

    def ask(self, asked: RenewalRequest, device: str = "device-0") -> RenewalAnswer:
        """Sends a request and lets the service answer."""
        self.deliver((topics.up(device, "msg"), encode(asked)))
        self.service.step(0)
        sent, self.transport.sent = self.transport.sent, []
        answers = [decode_to_device(f)[0] for topic, f in sent if topic == topics.down(device, "msg")]
        (answer,) = [each for each in answers if isinstance(each, RenewalAnswer)]
        return answer

    def request(self, key: Ed25519PrivateKey | None = None, device: str = "device-0") -> RenewalRequest:
        one = self.devices[device]
        certificate = one.bundle.certificate
        return ask(one.bundle.fleet, one.device_id, certificate, one.identity, key or one.identity)

    def serials(self, device: str = "device-0") -> list[str]:
        return [each.serial for each in self.operator.certificates(device)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Renewing]:
    found = Renewing(tmp_path, devices=2)
    found.step()
    yield found
    found.close()


def test_a_certificate_that_is_old_is_renewed_and_the_old_one_stays_good(bench: Renewing) -> None:
    bench.clock.now += LATE
    answer = bench.ask(bench.request())
    assert answer.code == "renewed" and answer.certificate is not None
    fresh = verify_certificate(answer.certificate, bench.authority.ca, now=int(bench.clock.moment().unix))
    assert fresh.device_id == "device-0"
    assert bench.operator.device("device-0").certificate == answer.certificate
    assert [each.revoked_at for each in bench.operator.certificates("device-0")] == [None, None]
    # The answer may be lost: the same request gets the same certificate.
    assert bench.ask(bench.request()).certificate == answer.certificate
    assert len(bench.serials()) == 2


def test_a_young_certificate_is_answered_by_itself(bench: Renewing) -> None:
    answer = bench.ask(bench.request())
    assert answer.certificate == bench.devices["device-0"].bundle.certificate
    assert answer.time == int(bench.clock.moment().unix) and len(bench.serials()) == 1


def test_a_new_key_takes_its_place_but_not_one_after_the_other(bench: Renewing) -> None:
    bench.clock.now += 7200
    new = Ed25519PrivateKey.generate()
    answer = bench.ask(bench.request(new))
    assert answer.certificate is not None
    now = int(bench.clock.moment().unix)
    fresh = verify_certificate(answer.certificate, bench.authority.ca, now=now)
    assert fresh.public_key.public_bytes_raw() == new.public_key().public_bytes_raw()
    assert bench.ask(bench.request(new)).certificate == answer.certificate
    refused = bench.ask(bench.request(Ed25519PrivateKey.generate()))
    assert (refused.code, refused.certificate, refused.again) == ("too-soon", None, 3600)
    assert len(bench.serials()) == 2


def test_nobody_renews_for_another_or_with_what_is_no_good(bench: Renewing) -> None:
    bench.clock.now += LATE
    mine, other = bench.request(), bench.request(device="device-1")
    stranger = Ed25519PrivateKey.generate()
    one = bench.devices["device-0"]
    forged = ask("orchard", "device-0", one.bundle.certificate, stranger, stranger)
    elsewhere = ask("other-fleet", "device-0", one.bundle.certificate, one.identity, one.identity)
    swapped = mine.model_copy(update={"request": forged.request})
    for asked in (other, forged, elsewhere, swapped, mine.model_copy(update={"request": b"\0" * 64})):
        answer = bench.ask(asked)
        assert (answer.code, answer.certificate) == ("bad-request", None)
    with bench.repository.write() as writer:
        writer.revoke_certificate(bench.serials()[0], 1.0, "lost")
    assert "revoked" in bench.ask(mine).detail
    bench.clock.now += LATE
    assert bench.ask(bench.request(device="device-1"), "device-1").code == "bad-request"  # it has ended
    assert len(bench.serials()) == len(bench.serials("device-1")) == 1


def test_without_the_ca_key_it_is_asked_to_come_later(bench: Renewing) -> None:
    bench.clock.now += LATE
    bench.authority = replace(bench.authority, ca_key=None)
    answer = bench.ask(bench.request())
    assert (answer.code, answer.certificate) == ("ca-offline", None) and answer.again > 3600
    # Who had a certificate already gets it without the key.
    assert bench.ask(bench.request(device="device-1"), "device-1").code == "ca-offline"
