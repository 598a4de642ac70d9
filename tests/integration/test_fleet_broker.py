"""A fleet as `covey aggregator init` makes it: mosquitto with those files, TLS, who may do what, a round."""

from __future__ import annotations

import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator.fleet import access
from aggregator.fleet.authority import EnrolmentRefused
from aggregator.fleet.broker import AGGREGATOR
from deploy.broker import find_mosquitto
from edge_client.device_setup import initialise
from models import zoo
from protocol import topics
from protocol.identity import create_ca, create_request, issue_certificate
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, Fleet, running, wait_for
from tests.fleet_bench import Bench, fleet_bench, run

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with fleet_bench(tmp_path) as found:
        yield found


@pytest.mark.e2e
def test_a_round_over_mutual_tls(bench: Bench) -> None:
    manifest = zoo.load("watch").manifest
    data = Fleet(bench.state.parent)
    names = ("barn-1", "barn-2", "barn-3")
    devices = [Device(bench.device(name), data.data(name, manifest), bench.broker) for name in names]  # type: ignore[arg-type]
    folder = Path(zoo.__file__).parent / "watch"
    with ServiceProcess(bench.state, bench.broker.url) as service, running(*devices):
        wait_for(lambda: covey.is_running(bench.state), what="the service")
        run("model", "publish", folder, "--state", bench.state)
        told = run(
            *("round", "start", "--state", bench.state, "--model", "watch", "--rounds", 1, "--cohort", 3),
            *("--privacy", "distributed", "--noise-multiplier", 0.01, "--watch"),
        )
        assert "completed" in told, service.log
        # Every device gets the new version by the broker too, and says so.
        wait_for(
            lambda: run("device", "list", "--state", bench.state).count("watch 2") == 3, what="version 2"
        )
    assert "refused" not in bench.broker.log_file.read_text().lower()


def test_who_shows_no_certificate_of_the_fleet_is_not_let_in(bench: Bench) -> None:
    with bench.peer(None, "barn-1") as stranger:
        assert not stranger.connect()
    # A certificate that says all the right things, of a CA that calls itself by the same name.
    key, ca_key, now = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate(), int(time.time())
    ca = create_ca(ca_key, "orchard", now=now, days=30, serial=1)
    forged = issue_certificate(ca_key, ca, "barn-1", key.public_key(), now=now, days=30, serial=2)
    identity = bench.state.parent / "forged"
    initialise(identity, "barn-1")
    (identity / "ca.pem").write_bytes((bench.state / "ca.pem").read_bytes())
    (identity / "identity.pem").chmod(0o600)
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (identity / "identity.pem").write_bytes(pem)
    (identity / "certificate.pem").write_text(ssl.DER_cert_to_PEM_cert(forged))
    with bench.peer(identity, "barn-1") as stranger:
        assert not stranger.connect()


def test_a_device_has_its_own_topics_and_no_others(bench: Bench) -> None:
    one, two = bench.device("barn-1"), bench.device("barn-2")
    bench.admit()
    with bench.peer(one, "barn-1") as a, bench.peer(two, "barn-2") as b, bench.aggregator() as hub:
        assert a.connect() and b.connect() and hub.connect()
        for peer in (a, b):
            for topic in (
                "#",
                "covey/v1/#",
                topics.UPLINKS,
                topics.downlinks("+"),
                topics.downlinks("barn-1"),
            ):
                assert peer.subscribe(topic) == (peer is a and topic == topics.downlinks("barn-1"))
            # Nobody gets among those who share what is meant for the aggregator, and may lose it.
            assert not peer.subscribe(f"$share/group/{topics.UPLINKS}")
            assert not peer.subscribe(f"$share/covey.aggregator/{topics.up('barn-1', 'msg')}")
            assert not peer.subscribe("$SYS/#")
            assert not peer.subscribe(access.RESPONSES)
            assert peer.subscribe(topics.MODELS)
        assert hub.subscribe(topics.UPLINKS)
        # B tries everything that is A's, or the aggregator's.
        for topic in (
            topics.up("barn-1", "msg"),
            topics.up("barn-1", "status"),
            topics.down("barn-1", "msg"),
            topics.down("barn-2", "msg"),
            topics.model("watch"),
            topics.up("barn-2", "msg").replace("msg", "other"),
            "covey/v2/x",
            access.CONTROL,
        ):
            b.publish(topic, b"forged", retain=True)
        a.publish(topics.up("barn-1", "msg"), b"from A")
        b.publish(topics.up("barn-2", "chunk"), b"from B")
        hub.publish(topics.down("barn-1", "msg"), b"to A")
        hub.publish(topics.model("watch"), b"to all", retain=True)
        # What comes last has come after all that was let through before it.
        wait_for(lambda: len(hub.heard) >= 2 and len(a.heard) >= 2 and b.heard, what="the messages")
        time.sleep(0.3)
        assert sorted(hub.heard) == [
            (topics.up("barn-1", "msg"), b"from A"),
            (topics.up("barn-2", "chunk"), b"from B"),
        ]
        # Several of A's subscriptions match: the broker may deliver once or once for each.
        assert set(a.heard) == {
            (topics.down("barn-1", "msg"), b"to A"),
            (topics.model("watch"), b"to all"),
        }
        assert set(b.heard) == {(topics.model("watch"), b"to all")}


def test_what_was_retained_and_last_wills_are_guarded_alike(bench: Bench) -> None:
    one, two = bench.device("barn-1"), bench.device("barn-2")
    bench.admit()
    with bench.aggregator() as hub:
        assert hub.connect() and hub.subscribe(topics.UPLINKS)
        hub.publish(topics.own_model("barn-1", "watch"), b"to A", retain=True)
        with bench.peer(two, "barn-2", will=(topics.up("barn-1", "status"), b"forged")) as b:
            b.connect()
            for topic in ("#", topics.downlinks("barn-1"), topics.own_model("barn-1", "watch")):
                b.subscribe(topic)
            b.drop()
        with bench.peer(one, "barn-1", will=(topics.up("barn-1", "status"), b"gone")) as a:
            assert a.connect() and a.subscribe(topics.downlinks("barn-1"))
            wait_for(lambda: a.heard, what="what was retained")
            a.drop()
        wait_for(lambda: hub.heard, what="the will")
        assert hub.heard == [(topics.up("barn-1", "status"), b"gone")]
        assert a.heard == [(topics.own_model("barn-1", "watch"), b"to A")]
        assert b.heard == []


def test_without_the_plugin_the_broker_does_not_start(bench: Bench) -> None:
    bench.broker.stop()
    configuration = bench.state / "broker" / "mosquitto.conf"
    text = configuration.read_text()
    configuration.write_text(text.replace("mosquitto_dynamic_security.so", "no_such_plugin.so"))
    with pytest.raises(AssertionError, match="no_such_plugin"):
        bench.broker.start()


def test_nobody_connects_as_another(bench: Bench) -> None:
    one, two = bench.device("barn-1"), bench.device("barn-2")
    bench.admit()
    with bench.peer(one, "barn-1") as a, bench.aggregator() as hub:
        assert a.connect() and hub.connect()
        a.subscribe(topics.downlinks("barn-1"))
        # The client id of the certificate counts, so an impostor takes over nobody's session.
        for name in ("barn-1", AGGREGATOR, "covey-aggregator-orchard"):
            with bench.peer(two, name) as impostor:
                impostor.connect()
                impostor.subscribe(topics.downlinks("barn-1"))
                hub.publish(topics.down("barn-1", "msg"), name.encode())
                wait_for(lambda n=name: (topics.down("barn-1", "msg"), n.encode()) in a.heard, what=name)
                assert not impostor.heard
        assert a.connected and hub.connected


def test_the_files_are_private_and_say_who_is_who(bench: Bench) -> None:
    state = bench.state
    for path in (*(state / "broker").rglob("*"), *(state / "keys").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    certificate = x509.load_pem_x509_certificate((state / "broker" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    # Nobody can enrol as the aggregator.
    request = create_request(Ed25519PrivateKey.generate(), AGGREGATOR)
    with pytest.raises(EnrolmentRefused, match="--name"):
        covey.enrol(state, request)


def test_fresh_certificates_for_another_name(bench: Bench) -> None:
    bench.broker.stop()
    before = (bench.state / "keys" / "aggregator.pem").read_bytes()
    run("aggregator", "broker", "--state", bench.state, "--name", "broker.example", "--name", "10.9.8.7")
    assert (bench.state / "keys" / "aggregator.pem").read_bytes() != before
    certificate = x509.load_pem_x509_certificate((bench.state / "broker" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "broker.example" in names.get_values_for_type(x509.DNSName)
    assert "10.9.8.7" in map(str, names.get_values_for_type(x509.IPAddress))
    bench.broker.start()
    with bench.aggregator() as hub:
        assert hub.connect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's mosquitto changes its user")
def test_started_by_root_it_says_what_to_do_or_becomes_the_owner(bench: Bench) -> None:
    broker = bench.broker
    broker.stop()
    for path in (broker.directory, *broker.directory.rglob("*")):
        os.chown(path, 0, 0)
    start = ("/bin/sh", str(broker.directory / "start"))
    refused = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1 and "chown -R USER: STATE" in refused.stderr
    broker.adopt()
    with broker.log_file.open("ab") as log, subprocess.Popen(start, stderr=log) as process:
        try:
            wait_for(lambda: broker.listens() or process.poll() is not None, 60, "the broker")
            assert process.poll() is None, broker.log_file.read_text()
            assert Path(f"/proc/{process.pid}").stat().st_uid == broker.directory.stat().st_uid != 0
        finally:
            process.terminate()
