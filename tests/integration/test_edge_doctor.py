"""`covey-edge doctor`: each trouble is made for real, and is found by its name with what to do about it."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from edge_client import doctor
from edge_client.adapters.checks import Subject, examine
from edge_client.adapters.data import NpzDirectory
from edge_client.doctor import Finding
from edge_client.policy import DevicePolicy
from protocol.identity import issue
from tests.edge_broker import Device, Fleet, command, running, wait_for

DAY = 86_400


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def state(fleet: Fleet) -> Path:
    return fleet.enrolled("barn-1", DevicePolicy())


def found(subject: Subject, check: str) -> Finding:
    """One check's result; those after it are not made."""
    return next(finding for finding in examine(subject) if finding.check == check)


@contextlib.contextmanager
def broker(
    fleet: Fleet,
    folder: Path,
    *,
    signer: Fleet | None = None,
    made: int = 0,
    days: int = 90,
    address: str = "127.0.0.1",
    asks: bool = True,
    takes: bool = True,
) -> Iterator[str]:
    """A TLS server as a broker is one; yields its address."""
    signer, key = signer or fleet, Ed25519PrivateKey.generate()
    certificate = issue(
        signer.ca_key,
        signer.ca,
        "broker",
        key.public_key(),
        ExtendedKeyUsageOID.SERVER_AUTH,
        now=int(time.time()) + made,
        days=days,
        serial=7,
        names=[x509.IPAddress(ipaddress.ip_address(address))],
    )
    chain = folder / "broker.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    if asks:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert((fleet if takes else Fleet(folder)).ca))
    server = socket.create_server(("127.0.0.1", 0))
    held: list[ssl.SSLSocket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with contextlib.suppress(ssl.SSLError):
                    held.append(context.wrap_socket(server.accept()[0], server_side=True))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"mqtts://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)
        for connection in held:
            connection.close()


def test_a_healthy_device_has_no_trouble(fleet: Fleet, state: Path, tmp_path: Path) -> None:
    from models import zoo

    fleet.data("barn-1", zoo.load("watch").manifest)
    with broker(fleet, tmp_path) as url:
        done = subprocess.run(
            command(
                "doctor", "--state", state, "--broker", url, "--data", tmp_path / "barn-1-data", "--json"
            ),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    answer = json.loads(done.stdout)
    assert done.returncode == 0, answer
    checks = {finding["check"]: finding["verdict"] for finding in answer["findings"]}
    assert checks.keys() >= {"permissions", "disk", "clock", "certificate", "runtime", "memory", "data"}
    assert [checks[name] for name in ("dns", "tcp", "tls", "runtime", "clock")] == ["ok"] * 5


def test_a_trouble_is_printed_with_what_to_do_and_an_exit_code(state: Path) -> None:
    done = subprocess.run(
        command("doctor", "--state", state, "--broker", "mqtts://127.0.0.1:1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED   tcp" in done.stdout and "-> is the broker running" in done.stdout
    assert "see above" in done.stderr


@pytest.mark.parametrize(
    ("trouble", "verdict", "detail", "advice"),
    [
        ({"made": -100 * DAY}, "failed", "certificate has expired", "if the clock above is right"),
        ({"made": 2 * DAY}, "failed", "not yet valid", "clock behind"),
        ({"address": "127.0.0.9"}, "failed", "IP address mismatch", "--name HOST"),
        ({"signer": "another"}, "failed", "certificate", "not of this fleet's CA"),
        ({"days": 5}, "warning", "the broker's certificate ends", "tell the operator"),
        ({"takes": False}, "failed", "the broker ends the connection", "revoked"),
    ],
)
def test_each_trouble_of_tls_is_told_apart(
    fleet: Fleet, state: Path, tmp_path: Path, trouble: dict[str, Any], verdict: str, detail: str, advice: str
) -> None:
    if "signer" in trouble:
        trouble = {"signer": Fleet(tmp_path)}
    with broker(fleet, tmp_path, **trouble) as url:
        finding = found(Subject(state, url), "tls")
    assert finding.verdict == verdict
    assert detail in finding.detail and advice in finding.advice


def test_the_client_waits_for_the_right_time_and_says_so(fleet: Fleet, state: Path, tmp_path: Path) -> None:
    """As after a power cut of a Pi: the broker's certificate is of a time that has not come."""
    (tmp_path / "data").mkdir()
    with broker(fleet, tmp_path, made=2 * DAY) as url:
        device = Device(state, tmp_path / "data", SimpleNamespace(url=url))  # type: ignore[arg-type]
        with running(device):
            said = "certificate is not yet valid"
            wait_for(lambda: device.log.read_text().count(said) >= 2, what="the second attempt")
            assert device.stop() == 0
    assert "waiting for the right time, this device's clock says 20" in device.log.read_text()


def test_a_name_without_an_address_is_a_matter_of_dns(state: Path) -> None:
    findings = [f for f in examine(Subject(state, "mqtts://no-such-host.invalid")) if f.verdict == "failed"]
    assert [finding.check for finding in findings] == ["dns"] and "resolvectl" in findings[0].advice


def test_nothing_is_said_in_the_clear(state: Path) -> None:
    assert "unencrypted" in found(Subject(state, "mqtt://192.0.2.1"), "broker").detail
    assert "nobody says" in found(Subject(state), "broker").detail


def test_a_key_that_others_can_read_is_found(state: Path) -> None:
    (state / "identity.pem").chmod(0o644)
    finding = found(Subject(state), "permissions")
    assert finding.verdict == "failed" and "identity.pem" in finding.detail and "chmod 600" in finding.advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_state_of_somebody_else_is_found(state: Path) -> None:
    (state / "identity.pem").chmod(0)
    assert "identity.pem" in found(Subject(state), "permissions").detail


def test_a_device_that_is_not_enrolled_is_told_to(tmp_path: Path) -> None:
    assert "enrol" in found(Subject(tmp_path / "nothing"), "permissions").advice
    (tmp_path / "empty").mkdir(mode=0o700)
    assert "enrol" in found(Subject(tmp_path / "empty"), "enrolment").advice


def test_a_damaged_enrolment_is_found(state: Path) -> None:
    text = (state / "enrolment.json").read_text()
    (state / "enrolment.json").write_text(text.replace('"fleet": "barn"', '"fleet": "shed"'))
    assert found(Subject(state), "enrolment").verdict == "failed"


def test_a_file_system_that_takes_no_writes_is_found(state: Path) -> None:
    """In a mount namespace of its own, where the state is read-only for real."""
    unshare = shutil.which("unshare")
    own = f'mount --bind "{state}" "{state}" && mount -o remount,ro,bind "{state}" && exec "$@"'
    runner = [str(unshare), "--map-root-user", "--mount", "sh", "-c", own, "sh"]
    if unshare is None or subprocess.run([*runner, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*runner, *command("doctor", "--state", state, "--json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    disk = next(each for each in json.loads(done.stdout)["findings"] if each["check"] == "disk")
    assert done.returncode == 1 and "Read-only file system" in disk["detail"] and "dmesg" in disk["advice"]


def test_a_runtime_for_another_processor_ends_only_its_own_process(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "path" / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "interpreter.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(__file__).parents[2]}")
    finding = found(Subject(state), "runtime")
    assert finding.verdict == "failed" and "SIGILL" in finding.detail and "aarch64" in finding.advice


def test_a_data_directory_without_data_is_a_warning(state: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    finding = found(Subject(state, data=NpzDirectory(tmp_path / "none")), "data")
    assert finding.verdict == "warning" and "edge.toml" in finding.advice


def test_a_kernel_that_does_not_count_memory_by_service_is_a_warning(state: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, text in {
        "proc/meminfo": "MemAvailable: 409600 kB\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
        "run/systemd/timesync/clock": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subject = Subject(state, root=root)
    memory, clock = found(subject, "memory"), found(subject, "clock")
    assert "MemoryMax" in memory.detail and "cgroup_enable=memory" in memory.advice
    assert clock.verdict == "warning" and "not set from the network" in clock.detail
    (root / "run/systemd/timesync/synchronized").touch()
    (root / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert found(subject, "memory").verdict == found(subject, "clock").verdict == "ok"


@pytest.mark.parametrize(
    ("now", "verdict", "said"),
    [
        (0, "failed", "before this device's certificate is valid"),
        (1_000_000 + 500, "failed", "was at work at"),
        (1_000_000 + 20_000, "ok", "1970-01-12"),
        (3_000_001, "failed", "after this device's certificate ended"),
    ],
)
def test_the_clock_is_judged_by_what_cannot_be_later(now: int, verdict: str, said: str) -> None:
    finding = doctor.clock(now, 1_000_000, 3_000_000, 1_010_000, None)
    assert finding.verdict == verdict and said in finding.detail


@pytest.mark.parametrize(("free", "verdict"), [(19, "failed"), (21, "warning"), (201, "ok")])
def test_little_space_is_said_before_there_is_none(free: int, verdict: str) -> None:
    assert doctor.disk(free * 2**20, 2**30).verdict == verdict
