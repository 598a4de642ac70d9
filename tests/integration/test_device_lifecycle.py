"""Devices that leave the fleet: cut off at a real broker within seconds, for good, and missed by no round."""

from __future__ import annotations

import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator.adapters import keyfiles
from deploy.broker import find_mosquitto
from edge_client.adapters.credentials import CERTIFICATE, KEY
from edge_client.device_setup import initialise
from models import zoo
from protocol import topics
from protocol.enrolment import EnrolmentRequest
from protocol.identity import create_request
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, Fleet, running, wait_for
from tests.fleet_bench import Bench, fleet_bench, run
from tests.fleet_broker import Peer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]

SECONDS = 30.0
"""Within which somebody must be cut off; on a machine with nothing else to do it takes one or two."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with fleet_bench(tmp_path) as found:
        yield found


@pytest.fixture
def service(bench: Bench) -> Iterator[ServiceProcess]:
    with ServiceProcess(bench.state, bench.broker.url) as running_service:
        wait_for(lambda: covey.is_running(bench.state), what="the service")
        yield running_service


def gets_nothing(peer: Peer, device_id: str) -> bool:
    """Whether a client is not let in, or is and may neither speak nor listen."""
    if not peer.connect():
        return True
    return not peer.subscribe(topics.downlinks(device_id)) and not peer.subscribe(topics.MODELS)


def test_a_revoked_device_is_cut_off_and_cannot_return(bench: Bench, service: ServiceProcess) -> None:
    one, two = bench.device("barn-1"), bench.device("barn-2")
    wait_for(lambda: bench.knows("barn-1") and bench.knows("barn-2"), what="both to be let in")
    with bench.peer(one, "barn-1") as a, bench.peer(two, "barn-2") as b:
        assert a.connect() and a.subscribe(topics.downlinks("barn-1"))
        assert b.connect() and b.subscribe(topics.downlinks("barn-2"))
        for channel in topics.UP_CHANNELS:
            a.publish(topics.up("barn-1", channel), b"left behind", retain=True)
            b.publish(topics.up("barn-2", channel), b"kept", retain=True)
        told = run("device", "revoke", "barn-1", "--reason", "stolen", "--state", bench.state)
        assert "barn-1 is revoked" in told
        wait_for(lambda: not a.connected, SECONDS, "the thief to be cut off")
        assert b.connected
        with bench.peer(one, "barn-1") as again:
            assert gets_nothing(again, "barn-1")

        # The list of revoked certificates keeps it from getting that far, and nobody else.
        def refused() -> bool:
            bench.broker.adopt()
            with bench.peer(one, "barn-1") as more:
                return not more.connect()

        wait_for(refused, what="the broker to take up the list")
        assert b.connected
    service.end(signal.SIGTERM)
    bench.broker.stop()
    bench.broker.start()
    # With nobody there to tell it anything.
    with bench.peer(one, "barn-1") as a, bench.peer(two, "barn-2") as b:
        assert not a.connect()
        assert b.connect() and b.subscribe(topics.downlinks("barn-2"))
    with bench.aggregator() as hub:
        assert hub.connect() and hub.subscribe(topics.UPLINKS)
        wait_for(lambda: len(hub.heard) >= len(topics.UP_CHANNELS), 30, "what is retained")
        assert {topic for topic, payload in hub.heard} == {
            topics.up("barn-2", channel) for channel in topics.UP_CHANNELS
        }
    shown = run("device", "show", "barn-1", "--state", bench.state)
    assert "revoked" in shown and "stolen" in shown


def test_with_the_ca_key_elsewhere_a_revoked_device_still_gets_nothing(
    bench: Bench, service: ServiceProcess
) -> None:
    one = bench.device("barn-1")
    wait_for(lambda: bench.knows("barn-1"), what="the device to be let in")
    (bench.state / "keys" / "ca-key.pem").rename(bench.state.parent / "elsewhere.pem")
    with bench.peer(one, "barn-1") as a:
        assert a.connect()
        run("device", "retire", "barn-1", "--state", bench.state)
        wait_for(lambda: not a.connected, SECONDS, "the device to be cut off")
    for _ in range(2):
        with bench.peer(one, "barn-1", will=(topics.up("barn-1", "status"), b"?")) as a:
            assert gets_nothing(a, "barn-1")
        bench.broker.stop()
        bench.broker.start()


def test_who_takes_a_name_over_has_it_alone(bench: Bench, service: ServiceProcess) -> None:
    old = bench.device("barn-1")
    wait_for(lambda: bench.knows("barn-1"), what="the device to be let in")
    with bench.peer(old, "barn-1") as former:
        assert former.connect()
        key = Ed25519PrivateKey.generate()
        with covey.open_operator(bench.state) as operator:
            (made,) = operator.make_tickets(
                amount=1, name="barn-1", seconds=60, replaces=True, url="https://hub:8443", created_by="test"
            )
            request = EnrolmentRequest(token=made.ticket.token, request=create_request(key, "barn-1"))
            bundle = operator.enrol_by_ticket(request, lambda: keyfiles.load(bench.state / "keys"))
        new = bench.state.parent / "new"
        initialise(new, "barn-1")
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (new / KEY).write_bytes(pem)
        (new / CERTIFICATE).write_text(ssl.DER_cert_to_PEM_cert(bundle.certificate))
        (new / "ca.pem").write_bytes((bench.state / "ca.pem").read_bytes())

        def sent_away() -> bool:
            bench.broker.adopt()
            return not former.connected

        wait_for(sent_away, what="the former device to be sent away")
    with bench.peer(old, "barn-1") as former, bench.peer(new, "barn-1") as successor:
        assert not former.connect()
        assert successor.connect() and successor.subscribe(topics.downlinks("barn-1"))


def test_a_round_goes_on_without_a_device_that_is_revoked(bench: Bench, service: ServiceProcess) -> None:
    manifest = zoo.load("watch").manifest
    data = Fleet(bench.state.parent)
    names = ("barn-1", "barn-2", "barn-3", "barn-4")
    devices = [Device(bench.device(name), data.data(name, manifest), bench.broker) for name in names]  # type: ignore[arg-type]
    folder = Path(zoo.__file__).parent / "watch"
    with running(*devices):
        run("model", "publish", folder, "--state", bench.state)

        def ready() -> bool:
            listed = run("device", "list", "--state", bench.state, "--json")
            return listed.count('"online": true') == 4 and listed.count('"watch": 1') == 4

        wait_for(ready, what="four devices with the model")
        # One that was invited and says nothing more would hold the round until its deadline.
        devices[3].signal(signal.SIGSTOP)
        try:
            run(
                *("round", "start", "--state", bench.state, "--model", "watch", "--rounds", 2, "--cohort", 4),
                *("--minimum", 3, "--min-survivors", 3, "--privacy", "distributed"),
                *("--noise-multiplier", 0.01, "--advertise-seconds", 600, "--share-seconds", 600),
                *("--input-seconds", 600, "--check-seconds", 600, "--unmask-seconds", 600),
            )

            with covey.open_operator(bench.state) as operator:
                wait_for(lambda: operator.rounds(), what="the round")
                assert "barn-4" in operator.rounds()[0].record.invited
                run("device", "revoke", "barn-4", "--state", bench.state)
                wait_for(lambda: operator.rounds()[0].record.status == "completed", what="its end")
                first = operator.rounds()[0]
                assert first.report.survivors == names[:3]
                # Three are enough, and the fourth is not asked again.
                wait_for(lambda: len(operator.rounds()) == 2, 120, "the second round")
                assert operator.rounds()[1].record.invited == names[:3]
        finally:
            devices[3].signal(signal.SIGCONT)
