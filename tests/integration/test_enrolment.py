"""Devices that come into a fleet by tickets: real processes, real TLS, and what may go wrong on the way."""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator import main as covey
from aggregator.fleet.authority import Authority
from aggregator.web.limits import Limits
from aggregator.web.server import CertificateFiles
from deploy.broker import find_mosquitto, free_port
from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.store import DeviceStore
from edge_client.durable import SaveContribution
from edge_client.enrolling import LONGEST_WAIT_SECONDS, wait_seconds
from protocol.enrolment import ENROLMENTS_PATH, MAX_ANSWER_BYTES, TRUST_PATH, EnrolmentTicket
from protocol.identity import key_id
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import wait_for
from tests.enrolment_door import Door, come_in, door, ended, enroll, lead_to, server_files
from tests.fleet_broker import FleetBroker
from tests.unit.test_edge_store import committed_round

YEARS = 365 * 86_400


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Door]:
    with door(tmp_path / "agg", limits=Limits(failures="1000/minute")) as found:
        yield found


def test_a_device_comes_in_by_its_ticket(fleet: Door, tmp_path: Path) -> None:
    state, ticket = tmp_path / "edge", fleet.ticket(tmp_path, labels=("site=barn",))
    secret = EnrolmentTicket.from_text(ticket.read_text()).token
    code, out, err = ended(enroll(state, ticket))
    assert code == 0, err
    assert "barn-1 is enrolled in the fleet orchard" in out
    assert secret not in out + err
    assert not ticket.exists(), "the ticket is gone"
    credentials = load_credentials(state)
    assert credentials.bundle.broker == "mqtts://hub.example:8883"
    certificate = x509.load_der_x509_certificate(credentials.bundle.certificate)
    assert certificate.public_key() == credentials.identity.public_key()
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert {stat.S_IMODE(file.stat().st_mode) & 0o077 for file in state.iterdir()} == {0}
    with fleet.bench.client() as client:
        device, (token,) = client.device("barn-1"), client.enrolment_tokens()
    assert (device.token, device.labels) == (token.token, ("site=barn",))
    assert token.key_id == key_id(credentials.identity.public_key())


def test_of_two_devices_with_one_ticket_one_comes_in(fleet: Door, tmp_path: Path) -> None:
    text = fleet.ticket(tmp_path).read_text()
    files = [tmp_path / f"copy-{number}" for number in range(4)]
    for file in files:
        file.write_text(text)
    started = [enroll(tmp_path / f"edge-{number}", file) for number, file in enumerate(files)]
    results = [ended(process) for process in started]
    assert sorted(code for code, _, _ in results) == [0, 6, 6, 6], results
    assert all("another device was enrolled as barn-1" in err for code, _, err in results if code)
    winner = next(number for number, (code, _, _) in enumerate(results) if code == 0)
    assert [file.exists() for file in files] == [number != winner for number in range(4)]
    with fleet.bench.client() as client:
        (device,) = client.devices()
        assert len(client.certificates(device.device)) == 1


def test_the_same_device_may_show_its_ticket_again(fleet: Door, tmp_path: Path) -> None:
    ticket = fleet.ticket(tmp_path)
    text, state = ticket.read_text(), tmp_path / "edge"
    assert come_in(state, ticket)[0] == 0
    first = load_credentials(state).bundle
    # As when the power was cut before the ticket was removed.
    ticket.write_text(text)
    assert come_in(state, ticket)[0] == 0
    assert load_credentials(state).bundle == first
    # A thief of the ticket, later.
    ticket.write_text(text)
    code, err = come_in(tmp_path / "thief", ticket)
    assert code == 6 and "revoke" in err
    fleet.bench.clock.now += 3600
    code, err = come_in(state, ticket)
    assert code == 6 and "expired" in err
    assert load_credentials(state).bundle == first


def test_enrolling_anew_keeps_the_ledger_and_the_key(fleet: Door, tmp_path: Path) -> None:
    state = tmp_path / "edge"
    assert come_in(state, fleet.ticket(tmp_path))[0] == 0
    before = load_credentials(state)
    _, contribution, _ = committed_round()
    with DeviceStore.open(state) as store:
        store.apply([SaveContribution(contribution.entry)])
        spent = store.ledger()
    assert len(spent) == 1
    assert come_in(state, fleet.ticket(tmp_path, replaces=True))[0] == 0
    after = load_credentials(state)
    assert after.bundle.certificate != before.bundle.certificate
    assert after.identity.private_bytes_raw() == before.identity.private_bytes_raw()
    with DeviceStore.open(state) as store:
        assert store.ledger() == spent
    # As another device it would begin with an empty ledger: that takes another directory.
    code, err = come_in(state, fleet.ticket(tmp_path, name="barn-2"))
    assert code == 3 and "belongs to the enrolled device barn-1" in err
    assert fleet.tokens()["barn-2"] == "open"


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "not an enrolment ticket"), ("covey+https://x/a#b.c", "ticket"), ("x" * 9000, "at most")],
)
def test_what_is_no_ticket_is_refused_before_anything_is_made(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "ticket").write_text(text)
    code, err = come_in(tmp_path / "edge", tmp_path / "ticket")
    assert code == 1 and why in err
    assert not (tmp_path / "edge").exists() and (tmp_path / "ticket").exists()


# --- who answers is somebody else


def test_a_ticket_of_another_fleet_is_not_sent(fleet: Door, tmp_path: Path) -> None:
    ticket = fleet.ticket(tmp_path)
    with door(tmp_path / "other") as other:
        ticket.write_text(ticket.read_text().replace(fleet.url, other.url))
        code, err = come_in(tmp_path / "edge", ticket)
        assert code == 1 and "not the fleet that made this ticket" in err
        with other.bench.client() as client:
            assert not [entry for entry in client.audit_log().items if entry.role == "device"]
    assert fleet.tokens() == {"barn-1": "open"} and ticket.exists()


def test_somebody_who_knows_the_fleets_certificate_does_not_get_a_ticket_either(
    fleet: Door, tmp_path: Path
) -> None:
    """The CA's certificate is public: what counts is who has a key that it certified."""
    ticket = fleet.ticket(tmp_path)
    with door(tmp_path / "other") as other:
        lead_to(other.bench, trust=fleet.bench.context.operator.authority.ca)
        ticket.write_text(ticket.read_text().replace(fleet.url, other.url))
        code, err = come_in(tmp_path / "edge", ticket)
    assert code == 1 and "not by the ticket's authority" in err
    assert fleet.tokens() == {"barn-1": "open"}


def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    with door(tmp_path / "agg", name="hub.example") as fleet:
        code, err = come_in(tmp_path / "edge", fleet.ticket(tmp_path))
    assert code == 1 and "not for this name" in err


def test_an_api_with_a_certificate_from_elsewhere_is_pinned_by_who_issued_it(tmp_path: Path) -> None:
    elsewhere = Authority.create("internet", now=int(time.time()), serial=9)
    with door(tmp_path / "agg", shown=elsewhere) as fleet:
        lead_to(fleet.bench, trust=elsewhere.ca)
        assert come_in(tmp_path / "edge", fleet.ticket(tmp_path))[0] == 0
    assert load_credentials(tmp_path / "edge").bundle.fleet == "orchard"


def test_answers_that_are_none_are_refused(fleet: Door, tmp_path: Path) -> None:
    authority = fleet.bench.context.enrolling()
    now = fleet.bench.clock.moment().unix
    files = server_files(tmp_path / "liar", authority, now=now)
    for number, (status, body, why) in enumerate(
        [
            (201, b"{}", "another version"),
            (201, b"x" * (2 * MAX_ANSWER_BYTES), "another version"),
            (404, b"<html>", "no API of a fleet"),
            (503, json.dumps({"code": "enrolment-closed", "detail": "\x1b[2Jlater"}).encode(), "enrolls"),
        ]
    ):
        with liar(files, authority.ca, status, body) as url:
            ticket = tmp_path / "ticket"
            ticket.write_text(fleet.ticket(tmp_path, f"barn-{number}").read_text().replace(fleet.url, url))
            code, err = come_in(tmp_path / "edge", ticket)
        assert code == 1 and why in err.replace("enrols nobody", "enrolls"), err
        assert "\x1b" not in err
    assert not (tmp_path / "edge" / "enrolment.json").exists()


def test_somebody_on_the_way_cannot_make_a_device_give_its_ticket_up(fleet: Door, tmp_path: Path) -> None:
    """Who answers the first question has proved nothing: only the service may say that a ticket is over."""
    stranger = Authority.create("stranger", now=int(time.time()), serial=9)
    files = server_files(tmp_path / "liar", stranger, now=time.time())
    ticket = fleet.ticket(tmp_path)
    text = ticket.read_text()
    for status, code in ((404, "token-revoked"), (410, "token-expired"), (422, "enrolment-refused")):
        problem = json.dumps({"code": code, "detail": "throw it away"}).encode()
        with liar(files, problem, 201, b"", trust_status=status) as url:
            ticket.write_text(text.replace(fleet.url, url))
            exit_code, err = come_in(tmp_path / "edge", ticket)
        assert exit_code == 1, (code, err)
    ticket.write_text(text)
    assert come_in(tmp_path / "edge", ticket)[0] == 0


@contextmanager
def liar(
    files: CertificateFiles, ca: bytes, status: int, body: bytes, *, trust_status: int = 200
) -> Iterator[str]:
    """A server with a certificate of its own, which answers whatever it likes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == TRUST_PATH
            self.answer(trust_status, ca)

        def do_POST(self) -> None:
            assert self.path == ENROLMENTS_PATH
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, body)

        def answer(self, code: int, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            # Who has read enough hangs up.
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"https://localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- clocks


@pytest.mark.parametrize("years", [10, -9])
def test_a_device_whose_clock_is_wrong_comes_in(tmp_path: Path, years: int) -> None:
    """It believes that it is years ago, or from now: all certificates are not valid yet, or not any more."""
    with door(tmp_path / "agg", since_now=years * YEARS) as fleet:
        code, err = come_in(tmp_path / "edge", fleet.ticket(tmp_path))
    assert code == 0, err
    assert "clock is off by" in err and "timedatectl" in err
    assert load_credentials(tmp_path / "edge").bundle.device_id == "barn-1"


def test_a_service_whose_clock_contradicts_its_own_certificate_is_refused(tmp_path: Path) -> None:
    with door(tmp_path / "agg", days=1) as fleet:
        ticket = fleet.ticket(tmp_path, seconds=30 * 86_400.0)
        fleet.bench.clock.now += 2 * 86_400
        code, err = come_in(tmp_path / "edge", ticket)
    assert code == 1 and "clock contradicts its certificate" in err
    assert not (tmp_path / "edge" / "enrolment.json").exists()


# --- it comes again


def test_a_device_comes_again_until_there_is_a_network(tmp_path: Path) -> None:
    port = free_port()
    with door(tmp_path / "agg") as fleet:
        ticket = fleet.ticket(tmp_path, url=f"https://localhost:{port}")
        code, err = come_in(tmp_path / "once", ticket)
        assert code == 1 and "nobody answers" in err
        process = enroll(tmp_path / "edge", ticket, "--retry")
        assert process.stderr is not None
        assert "coming again in" in process.stderr.readline()
        with forwarding(port, int(fleet.url.rpartition(":")[2])):
            code, _, err = ended(process)
        assert code == 0, err
        assert not ticket.exists()


@contextmanager
def forwarding(port: int, to: int) -> Iterator[None]:
    """The network comes up: what goes to one port arrives at another."""
    listener = socket.create_server(("127.0.0.1", port))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", to))
            pumps = [threading.Thread(target=pump, args=pair) for pair in ((near, far), (far, near))]
            for each in pumps:
                each.start()
            for each in pumps:
                each.join()
            near.close(), far.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_device_waits_while_the_key_of_the_ca_is_away(fleet: Door, tmp_path: Path) -> None:
    ca_key, vault = tmp_path / "agg" / "keys" / "ca-key.pem", tmp_path / "vault.pem"
    ticket = fleet.ticket(tmp_path)
    ca_key.rename(vault)
    code, err = come_in(tmp_path / "edge", ticket)
    assert code == 1 and "CA's key is kept elsewhere" in err
    process = enroll(tmp_path / "edge", ticket, "--retry")
    assert process.stderr is not None
    assert "coming again in" in process.stderr.readline()
    vault.rename(ca_key)
    assert ended(process)[0] == 0


def test_waits_grow_and_are_spread() -> None:
    assert [wait_seconds(attempt, 0.0) for attempt in (0, 1, 2)] == [1.0, 2.0, 4.0]
    assert wait_seconds(0, 0.5) == 1.5 and wait_seconds(10_000, 0.999) < LONGEST_WAIT_SECONDS
    assert wait_seconds(0, 0.0, 60.0) == 61.0


# --- the service in a process of its own

SUICIDE = """\
import os, signal, sys
from pathlib import Path
from aggregator.web import enrolment_routes
from aggregator.cli import main

inner, flag = enrolment_routes._enrol, Path(os.environ["COVEY_TEST_FLAG"])

def enrol(request, wanted):
    answer = inner(request, wanted)
    if flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

enrolment_routes._enrol = enrol
main()
"""


def covey_command(*arguments: object) -> str:
    """`covey`, as a person types it."""
    program = "from aggregator.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.e2e
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_a_service_killed_between_issue_and_answer_and_then_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the commit, before the answer; then the device meets its fleet, by what it was told."""
    state, flag = tmp_path / "agg", tmp_path / "flag"
    port, broker_port = free_port(), free_port()
    covey_command(
        *("aggregator", "init", "--state", state, "--fleet", "orchard"),
        *("--broker", f"mqtts://localhost:{broker_port}", "--api-url", f"https://localhost:{port}"),
    )
    monkeypatch.setenv("COVEY_TEST_FLAG", str(flag))
    service = ServiceProcess(state, f"mqtts://localhost:{broker_port}")
    service.program, service.options = ("-c", SUICIDE), ("--listen", f"0.0.0.0:{port}")
    ticket, edge = tmp_path / "ticket", tmp_path / "edge"
    with FleetBroker(state, broker_port), service:
        wait_for(lambda: (state / "api" / "local.json").exists(), what="the service")
        told = covey_command(
            *("device", "token", "--count", 2, "--name", "barn-{n}", "--label", "site=barn"),
            *("--out", tmp_path / "tickets", "--qr-dir", tmp_path / "qr", "--state", state),
        )
        assert "barn-1 to barn-2" in told
        assert stat.S_IMODE((tmp_path / "tickets").stat().st_mode) == 0o600
        assert sorted(path.name for path in (tmp_path / "qr").iterdir()) == ["barn-1.svg", "barn-2.svg"]
        ticket.write_text((tmp_path / "tickets").read_text().splitlines()[0])
        flag.touch()
        process = enroll(edge, ticket, "--retry")
        wait_for(lambda: not flag.exists(), what="the request")
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        with covey.open_operator(state) as operator:
            (issued,) = operator.certificates("barn-1")
        service.start()
        code, _, err = ended(process)
        assert code == 0 and "coming again" in err, err
        certificate = x509.load_der_x509_certificate(load_credentials(edge).bundle.certificate)
        assert f"{certificate.serial_number:x}" == issued.serial
        (tmp_path / "data").mkdir()
        log = (tmp_path / "edge.log").open("wb")
        client = subprocess.Popen(
            [sys.executable, "-m", "edge_client.main", "run", "--state", edge, "--data", tmp_path / "data"],
            stderr=log,
        )
        try:
            wait_for(
                lambda: "barn-1" in covey_command("device", "list", "--online", "--json", "--state", state),
                what="the device at its broker",
            )
        finally:
            client.terminate()
            client.wait()
            log.close()
        shown = covey_command("device", "show", "barn-1", "--state", state)
        assert "with ticket" in shown and issued.serial in shown and "site=barn" in shown
        listed = json.loads(covey_command("device", "token", "list", "--json", "--state", state))
        assert [each["status"] for each in listed] == ["used", "open"]
        revoked = covey_command("device", "token", "revoke", listed[1]["token"], "--state", state)
        assert "lets nobody in" in revoked
