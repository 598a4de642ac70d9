"""Looks for the usual troubles of a device: the part of `covey-edge doctor` that touches anything."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from edge_client import doctor
from edge_client.adapters import runtime_probe
from edge_client.adapters.credentials import (
    CA,
    KEY,
    CredentialError,
    load_credentials,
    tls_files,
)
from edge_client.adapters.files import StorageError
from edge_client.adapters.surroundings import Surroundings
from edge_client.doctor import Finding
from edge_client.sources import DataSource
from protocol.broker_address import BrokerAddress, InvalidAddress
from protocol.enrolment import EnrolmentBundle
from protocol.errors import ProtocolError

_TRY = ".doctor"
_TIME = "run/systemd/timesync"
# Codes of X509_V_ERR_*, see openssl-verification-options(1).
_NOT_YET, _EXPIRED, _WRONG_HOST, _WRONG_ADDRESS = 9, 10, 62, 64


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        state: the state directory.
        broker: where the fleet meets; None takes the enrolment's.
        insecure: whether a broker on another machine may be talked to in the clear.
        data: where examples come from; None when the owner has not said.
        root: above `sys`, `proc` and `run`; another folder in tests.
        seconds: how long each step on the network may take.
    """

    state: Path
    broker: str | None = None
    insecure: bool = False
    data: DataSource | None = None
    root: Path = Path("/")
    seconds: float = 10.0


def examine(subject: Subject) -> Iterator[Finding]:
    """Makes all checks, one after the other; those that need what an earlier one missed are left out."""
    yield from _state(subject.state)
    yield from _disk(subject.state)
    yield from _identity(subject)
    surroundings = Surroundings(subject.root)
    yield doctor.memory(surroundings.free_memory(), _memory_is_counted(subject.root))
    if subject.data is not None:
        yield _data(subject.data)
    yield from _network(subject)
    yield _runtime()


def _state(state: Path) -> Iterator[Finding]:
    owner = f"chown -R covey: {state}; chmod 700 {state}; run this as the client's user"
    if not state.is_dir():
        detail = f"there is no directory {state}"
        yield Finding("permissions", "failed", detail, "enrol first: covey-edge enroll --ticket FILE")
        return
    wrong = [
        path.name
        for path in (state, *state.glob("*"))
        if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0))
    ]
    if wrong:
        yield Finding("permissions", "failed", f"not mine to read and write: {', '.join(wrong[:5])}", owner)
        return
    open_to_all = [
        path.name
        for path in (state / KEY, state)
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    if open_to_all:
        fix = f"chmod 700 {state}; chmod 600 {state / KEY}; if others looked, enrol with a new key"
        yield Finding("permissions", "failed", f"others may look into {', '.join(open_to_all)}", fix)
        return
    yield Finding("permissions", "ok", "the state and its key are this user's alone")


def _disk(state: Path) -> Iterator[Finding]:
    if not state.is_dir():
        return
    try:
        path = state / _TRY
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, b"x" * 4096)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
    except OSError as error:
        advice = "look at `dmesg`: a card that fails turns read-only; write a new one, and enrol again"
        yield Finding("disk", "failed", f"nothing can be written: {error.strerror}", advice)
        return
    usage = shutil.disk_usage(state)
    yield doctor.disk(usage.free, usage.total)


def _identity(subject: Subject) -> Iterator[Finding]:
    now = int(time.time())
    try:
        start, end = _validity(load_credentials(subject.state).bundle)
    except (CredentialError, StorageError, ProtocolError, ValueError) as error:
        yield Finding("enrolment", "failed", str(error), "enrol: covey-edge enroll --ticket FILE")
        return
    newest = max(
        (int(path.stat().st_mtime) for path in subject.state.glob("*") if path.name != _TRY), default=0
    )
    yield doctor.clock(now, start, end, newest, _synchronised(subject.root))
    if start <= now:
        yield doctor.certificate(now, end)


def _validity(bundle: EnrolmentBundle) -> tuple[int, int]:
    """From when until when this device's certificate is valid, whatever the clock says."""
    certificate = x509.load_der_x509_certificate(bundle.certificate)
    start = int(certificate.not_valid_before_utc.timestamp())
    bundle.verify(now=start)
    return start, int(certificate.not_valid_after_utc.timestamp())


def _synchronised(root: Path) -> bool | None:
    return (root / _TIME / "synchronized").exists() if (root / _TIME).is_dir() else None


def _runtime() -> Finding:
    why = runtime_probe.probe()
    if why is None:
        return Finding("runtime", "ok", "TensorFlow Lite runs a model")
    advice = (
        "install the client's bundle for this system: uname -m has to say aarch64, as a 64-bit system does"
    )
    return Finding("runtime", "failed", f"TensorFlow Lite does not run here: {why}", advice)


def _memory_is_counted(root: Path) -> bool | None:
    try:
        return "memory" in (root / "sys/fs/cgroup/cgroup.controllers").read_text().split()
    except OSError:
        return None


def _data(data: DataSource) -> Finding:
    fault = data.fault()
    if fault is None:
        return Finding("data", "ok", "there is something to train on")
    return Finding("data", "warning", fault.detail, "see `[[data]]` in edge.toml, or --data")


def _network(subject: Subject) -> Iterator[Finding]:
    try:
        broker = subject.broker or load_credentials(subject.state).bundle.broker
    except (CredentialError, StorageError):
        broker = None
    if broker is None:
        yield Finding("broker", "failed", "nobody says where the fleet meets", "give --broker mqtts://HOST")
        return
    try:
        address = BrokerAddress.parse(broker, insecure=subject.insecure)
    except InvalidAddress as error:
        yield Finding("broker", "failed", str(error), "give --broker mqtts://HOST")
        return
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        advice = "look at `resolvectl status`: is there a network, and is the broker's name spelt right?"
        yield Finding("dns", "failed", f"{address.host} has no address: {error}", advice)
        return
    yield Finding("dns", "ok", f"{address.host} is {found[0][4][0]}")
    try:
        connection = socket.create_connection((address.host, address.port), subject.seconds)
    except OSError as error:
        advice = f"is the broker running, and does a firewall let port {address.port} through?"
        yield Finding("tcp", "failed", f"{address.host}:{address.port} does not answer: {error}", advice)
        return
    with connection:
        yield Finding("tcp", "ok", f"{address.host}:{address.port} answers")
        if address.tls:
            yield _tls(connection, address, subject)


def _tls(connection: socket.socket, address: BrokerAddress, subject: Subject) -> Finding:
    try:
        context = tls_files(subject.state).context()
    except InvalidAddress as error:
        return Finding("tls", "failed", str(error), "enrol again: the ledger stays")
    try:
        with context.wrap_socket(connection, server_hostname=address.host) as secured:
            end = int(ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"])))
            # With TLS 1.3 the broker's verdict on this device comes after the handshake.
            secured.settimeout(min(subject.seconds, 2.0))
            try:
                if secured.recv(1) == b"":
                    raise ConnectionResetError("the broker hung up")
            except TimeoutError:
                pass  # it waits for us to speak: all is well
    except ssl.SSLCertVerificationError as error:
        return Finding("tls", "failed", f"the broker's certificate: {error.verify_message}", _advice(error))
    except OSError as error:
        advice = "does the broker not take this device's certificate? Ask the operator whether it was revoked"
        return Finding("tls", "failed", f"the broker ends the connection: {error}", advice)
    if end - time.time() < doctor.SOON:
        advice = "tell the operator: covey aggregator broker renews it"
        return Finding("tls", "warning", f"the broker's certificate ends at {doctor.day(end)}", advice)
    return Finding("tls", "ok", f"the broker is the fleet's, and takes this device; until {doctor.day(end)}")


def _advice(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _NOT_YET:
        return "is this device's clock behind? See the clock above"
    if error.verify_code == _EXPIRED:
        return "if the clock above is right, tell the operator: covey aggregator broker renews it"
    if error.verify_code in (_WRONG_HOST, _WRONG_ADDRESS):
        return "the operator has to name this address: covey aggregator broker --name HOST"
    return f"it is not of this fleet's CA ({CA}): is the address right? Else enrol again"
