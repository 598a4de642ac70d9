"""A real client renews its certificate at a real service over mutual TLS, by itself and by hand."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator.adapters import keyfiles
from aggregator.fleet.authority import issued_certificate
from deploy.broker import find_mosquitto
from edge_client.adapters.credentials import CERTIFICATE, KEY, load_credentials
from edge_client.adapters.trial import try_certificate
from edge_client.device_setup import enrol
from edge_client.renewing import Trial
from models import zoo
from protocol.broker_address import BrokerAddress
from protocol.identity import issue_certificate
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, Fleet, running, wait_for
from tests.fleet_bench import Bench, fleet_bench, run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]
DAY = 86_400


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with fleet_bench(tmp_path) as found:
        yield found


def grow_old(bench: Bench, state: Path, days: int) -> None:
    """Gives an enrolled device, and the fleet's record of it, a certificate from so long ago."""
    from dataclasses import replace

    authority = keyfiles.load(bench.state / "keys")
    credentials = load_credentials(state)
    assert authority.ca_key is not None
    old = issue_certificate(
        authority.ca_key,
        authority.ca,
        credentials.bundle.device_id,
        credentials.identity.public_key(),
        now=int(time.time()) - days * DAY,
        days=730,
        serial=12345 + days,
    )
    with covey.open_operator(bench.state) as operator, operator.repository.write() as writer:
        device = replace(operator.device(credentials.bundle.device_id), certificate=old)
        writer.replace_certificate(device.device_id, old)
        writer.add_certificate(issued_certificate(device))
    enrol(state, credentials.bundle.model_copy(update={"certificate": old}))


def ends(state: Path) -> float:
    certificate = x509.load_pem_x509_certificate((state / CERTIFICATE).read_bytes())
    return certificate.not_valid_after_utc.timestamp()


def test_a_client_renews_by_itself_and_by_hand_and_goes_on(bench: Bench) -> None:
    manifest = zoo.load("watch").manifest
    data = Fleet(bench.state.parent)
    states = {name: bench.device(name) for name in ("barn-1", "barn-2", "barn-3")}
    grow_old(bench, states["barn-1"], 600)
    old_key = (states["barn-1"] / KEY).read_bytes()
    devices = [Device(state, data.data(name, manifest), bench.broker) for name, state in states.items()]  # type: ignore[arg-type]
    with ServiceProcess(bench.state, bench.broker.url) as service, running(*devices):
        wait_for(lambda: ends(states["barn-1"]) > time.time() + 700 * DAY, what="the renewal")
        assert (states["barn-1"] / KEY).read_bytes() == old_key
        asked = subprocess.run(
            [sys.executable, "-m", "edge_client.main", "renew", "--state", states["barn-2"], "--new-key"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert asked.returncode == 1 and "too-soon" in asked.stderr, asked
        with covey.open_operator(bench.state) as operator:
            certificates = operator.certificates("barn-1")
        assert [each.revoked_at for each in certificates] == [None] * 3
        # All three take part in a round with what they have now.
        run("model", "publish", Path(zoo.__file__).parent / "watch", "--state", bench.state)
        told = run(
            *("round", "start", "--state", bench.state, "--model", "watch", "--rounds", 1, "--cohort", 3),
            *("--privacy", "distributed", "--noise-multiplier", 0.01, "--watch"),
        )
        assert "completed" in told, service.log


def test_a_broker_says_whether_it_takes_a_certificate(bench: Bench) -> None:
    one = bench.device("barn-1")
    from edge_client.adapters.credentials import tls_files

    address = BrokerAddress.parse(bench.broker.url)
    assert try_certificate(address, tls_files(one)) is Trial.TAKEN
    grow_old(bench, one, 729)
    expired = issue_expired(bench, one)
    assert try_certificate(address, expired) is Trial.REFUSED
    bench.broker.stop()
    assert try_certificate(address, tls_files(one)) is Trial.UNREACHABLE


def issue_expired(bench: Bench, state: Path):  # type: ignore[no-untyped-def]
    from edge_client.adapters.credentials import tls_files
    from edge_client.adapters.tls import TlsFiles

    authority, credentials = keyfiles.load(bench.state / "keys"), load_credentials(state)
    assert authority.ca_key is not None
    der = issue_certificate(
        authority.ca_key,
        authority.ca,
        "barn-1",
        credentials.identity.public_key(),
        now=int(time.time()) - 40 * DAY,
        days=30,
        serial=99,
    )
    path = state.parent / "expired.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(der))
    files = tls_files(state)
    return TlsFiles(files.ca, path, files.key)
