"""Client updates: what is taken, what is refused, and a SIGKILL before every change to the file system."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.bundle.build import TARGETS
from deploy.bundle.signing import sign_bundle
from edge_client.adapters import systemd, versions
from edge_client.adapters.versions import Versions
from edge_client.installed import Outcome
from edge_client.updater import Trust, run
from edge_client.updating import UpdateRefused
from protocol.client_bundle import UnusableBundle
from protocol.client_release import CLIENT, RELEASE_KIND, ClientBundle, ClientRelease
from protocol.identity import SignedDocument, key_id
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment
from tests.client_bundles import TARGET, FakeService, bundle

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUST = Trust({key_id(OPERATOR.public_key()): OPERATOR.public_key()}, "orchard", "barn-1", TARGET)


class Device:
    """A simulated root: installed clients, and the inbox of the client."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inbox = folder / "opt", folder / "updates"
        self.inbox.mkdir(parents=True)
        (folder / "first").write_bytes(bundle("0.1.0"))
        store = Versions(self.folder)
        store.install("0.1.0", folder / "first")
        store.point("current", "0.1.0")
        store.point("good", "0.1.0")

    def offer(
        self,
        version: str,
        content: bytes | None = None,
        key: Ed25519PrivateKey = OPERATOR,
        target: str = TARGET,
    ) -> None:
        content = bundle(version) if content is None else content
        described = ClientBundle(target=target, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        release = ClientRelease(version=version, bundles=(described,))
        document = SignedDocument.create(key, RELEASE_KIND, release.to_bytes())
        (self.inbox / "bundle.tar.xz").write_bytes(content)
        (self.inbox / "release.json").write_text(document.model_dump_json())
        (self.inbox / "ready").touch()

    def assign(
        self,
        sequence: int,
        *,
        rollback: bool = False,
        key: Ed25519PrivateKey = OPERATOR,
        device: str | None = None,
        fleet: str = "orchard",
    ) -> str:
        """An assignment of the release that is offered, beside it; returns the digest of the file."""
        release = SignedDocument.model_validate_json((self.inbox / "release.json").read_bytes())
        assignment = VersionAssignment(
            fleet=fleet,
            model=CLIENT,
            device=device,
            version=ClientRelease.from_bytes(release.payload).number,
            manifest_sha256=release.digest.hex(),
            sequence=sequence,
            rollback=rollback,
        )
        document = SignedDocument.create(key, ASSIGNMENT_KIND, assignment.to_bytes())
        content = f"[{document.model_dump_json()}]".encode()
        (self.inbox / "assignments.json").write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def outcome(self) -> Outcome | None:
        """What the client reads of the last update."""
        return Outcome.from_text((self.folder / "outcome").read_text())

    def run(self, service: FakeService | None = None) -> str:
        return run(self.folder, self.inbox, TRUST, service or FakeService(self.folder))

    def runs(self) -> str:
        """The version that would start now; its files are whole."""
        current = self.folder / "current"
        version = current.readlink().name
        assert (current / "bin/covey-edge").read_text() == f"version {version}"
        assert (current / "bundle.json").is_file() and (current / "systemd/covey-edge.service").is_file()
        return version

    def versions(self) -> set[str]:
        return {path.name for path in (self.folder / "versions").iterdir()}


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_healthy_update_is_kept_beside_the_one_before(device: Device) -> None:
    for version, kept in (
        ("0.2.0", {"0.1.0", "0.2.0"}),
        ("0.10.0", {"0.2.0", "0.10.0"}),
    ):
        device.offer(version)
        assert device.run() == version == device.runs()
        assert device.versions() == kept
        (compiled,) = (device.folder / "current" / "site" / "__pycache__").iterdir()
        assert b"Not kept" not in compiled.read_bytes()
        assert f"versions/{version}/site/edge.py".encode() in compiled.read_bytes()
    assert not (device.folder / "trial").exists() and not (device.inbox / "ready").exists()


def test_one_that_does_not_stay_up_gives_way_and_is_not_tried_again(device: Device) -> None:
    device.offer("0.2.0")
    service = FakeService(device.folder, sick={"0.2.0"})
    assert device.run(service) == "0.1.0" == device.runs()
    assert service.started == ["0.2.0", "0.2.0", "0.1.0"] or service.started == ["0.2.0", "0.1.0"]
    assert device.versions() == {"0.1.0"}
    assert device.outcome() == Outcome("0.2.0", "", "it did not stay up")
    device.offer("0.2.0")
    with pytest.raises(UpdateRefused, match="failed on this device before"):
        device.run()
    device.offer("0.3.0")
    assert device.run() == "0.3.0"


def test_one_that_fails_its_self_test_never_runs(device: Device) -> None:
    device.offer("0.2.0")
    service = FakeService(device.folder, broken={"0.2.0"})
    with pytest.raises(UpdateRefused, match="it does not start"):
        device.run(service)
    assert service.started == [] and device.runs() == "0.1.0" and device.versions() == {"0.1.0"}


def test_what_the_bundle_builder_signs_is_taken(device: Device, tmp_path: Path) -> None:
    path = device.inbox / "bundle.tar.xz"
    path.write_bytes(bundle("0.2.0"))
    sign_bundle(path, TARGETS[TARGET], OPERATOR, "0.2.0").rename(device.inbox / "release.json")
    (device.inbox / "ready").touch()
    assert device.run() == "0.2.0" == device.runs()


def test_what_the_operator_did_not_sign_is_not_installed(device: Device) -> None:
    stranger = Ed25519PrivateKey.generate()
    cases: list[tuple[dict[str, object], type[Exception]]] = [
        ({"version": "0.2.0", "key": stranger}, UpdateRefused),
        ({"version": "0.0.9"}, UpdateRefused),
        ({"version": "0.2.0", "target": "trixie-arm64"}, UpdateRefused),
        ({"version": "0.2.0", "content": bundle("0.2.0", described="0.3.0")}, UnusableBundle),
        ({"version": "0.2.0", "content": bundle("0.2.0")[:200]}, UnusableBundle),
        ({"version": "0.2.0", "content": b"no archive"}, UnusableBundle),
    ]
    for offer, error in cases:
        device.offer(**offer)  # type: ignore[arg-type]
        with pytest.raises(error):
            device.run()
        assert device.runs() == "0.1.0" and device.versions() == {"0.1.0"}, offer
        assert not (device.inbox / "ready").exists()


def test_a_bundle_that_is_changed_after_signing_or_is_a_link_is_not_installed(
    device: Device, tmp_path: Path
) -> None:
    device.offer("0.2.0")
    (device.inbox / "bundle.tar.xz").write_bytes(bundle("0.3.0"))
    with pytest.raises(UnusableBundle, match="signed"):
        device.run()
    device.offer("0.2.0")
    (device.inbox / "bundle.tar.xz").rename(tmp_path / "secret")
    (device.inbox / "bundle.tar.xz").symlink_to(tmp_path / "secret")
    with pytest.raises(UnusableBundle, match="cannot open"):
        device.run()


def test_the_operator_may_take_a_version_back_and_nobody_else(device: Device) -> None:
    device.offer("0.2.0")
    taken = device.assign(100)
    assert device.run() == "0.2.0" and device.outcome() == Outcome("0.2.0", taken)

    device.offer("0.1.0")  # what the inbox holds of an earlier update says nothing about this one
    with pytest.raises(UpdateRefused, match=r"0\.1\.0 is not newer than 0\.2\.0"):
        device.run()
    for sequence, options, said in (
        (99, {"rollback": True}, "older than 100"),
        (110, {"rollback": True, "device": "barn-1"}, "older than 100"),  # where is what the fleet was told?
        (101, {"rollback": False}, "not newer"),
        (102, {"rollback": True, "key": Ed25519PrivateKey.generate()}, "not the operator's"),
        (102, {"rollback": True, "device": "barn-2"}, "another device"),
        (102, {"rollback": True, "fleet": "vineyard"}, "another device"),
    ):
        device.offer("0.1.0")
        digest = device.assign(sequence, **options)  # type: ignore[arg-type]
        with pytest.raises(UpdateRefused, match=said):
            device.run()
        outcome = device.outcome()
        assert outcome is not None and outcome.asked == digest and said in outcome.reason
        assert device.runs() == "0.2.0"

    device.offer("0.1.0")
    device.assign(102, rollback=True)
    (device.inbox / "bundle.tar.xz").unlink()  # it is still installed: nothing has to travel
    assert device.run() == "0.1.0" == device.runs()
    assert device.versions() == {"0.1.0", "0.2.0"}
    device.offer("0.2.0")
    device.assign(103)
    assert device.run() == "0.2.0" == device.runs()


def test_a_bundle_larger_than_any_is_not_copied(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.offer("0.2.0")
    monkeypatch.setattr(versions, "MAX_BUNDLE_BYTES", 1000)
    (device.inbox / "bundle.tar.xz").write_bytes(bytes(1001))
    with pytest.raises(UnusableBundle, match="larger than any bundle"):
        device.run()
    assert device.runs() == "0.1.0" and not (device.folder / ".incoming.tar.xz").exists()


@pytest.mark.parametrize("name", ["../../../escaped", "/covey-escaped", "link"])
def test_an_archive_cannot_write_outside_its_folder(device: Device, tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        if name == "link":
            entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, str(tmp_path), 0
        archive.addfile(entry, io.BytesIO(b"evil"))
    device.offer("0.2.0", buffer.getvalue())
    with pytest.raises(UnusableBundle, match="no plain file"):
        device.run()
    assert not list(tmp_path.rglob("escaped")) and not Path("/covey-escaped").exists()


CHANGES = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync", "write", "chmod", "utime")
"""Everything by which the updater changes the file system."""


def killed(device: Device, before: int, sick: set[str]) -> int:
    """Updates in a process of its own that is killed before its N-th change; returns how many it made."""
    reading, writing = os.pipe()
    report = os.write  # the one below counts itself
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapper

        os.fsync = lambda _: None  # a kill loses nothing that was written, flushed or not
        try:
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            service = FakeService(device.folder, sick=sick)
            service.start = counted(service.start)  # type: ignore[method-assign]
            service.healthy = counted(service.healthy)  # type: ignore[method-assign]
            device.run(service)
            report(writing, str(count).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (before > 0)
    return int(said or 0)


@pytest.mark.parametrize("sick", ["", "0.2.0"], ids=["a version that stays up", "a version that does not"])
def test_a_power_cut_before_any_change_leaves_a_client_that_works(
    tmp_path: Path, sick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    wanted = "0.1.0" if sick else "0.2.0"
    probe = Device(tmp_path / "probe")
    probe.offer("0.2.0")
    steps = killed(probe, 0, {sick})
    assert steps > 25 and probe.runs() == wanted
    for step in range(1, steps + 1):
        device = Device(tmp_path / f"cut-{step}")
        device.offer("0.2.0")
        killed(device, step, {sick})
        assert device.runs() in ("0.1.0", "0.2.0"), f"step {step}: the next boot has a whole client"
        assert (device.folder / "good" / "bin/covey-edge").is_file(), "the updater can run"
        # The next boot, and the path unit when the update still lies there; refused is what it was then.
        for _ in range(2):
            try:
                device.run(FakeService(device.folder, sick={sick}))
            except UpdateRefused as error:
                assert sick, (step, error)
        assert device.runs() == wanted, step
        assert not (device.folder / "trial").exists()
        assert device.versions() <= {"0.1.0", "0.2.0"}
        assert device.versions() >= {wanted}


def test_a_version_that_takes_the_power_with_it_is_given_up(device: Device) -> None:
    device.offer("0.2.0")
    store = Versions(device.folder)
    (device.folder.parent / "new").write_bytes(bundle("0.2.0"))
    store.install("0.2.0", device.folder.parent / "new")
    store.begin_trial("0.2.0", 2)
    store.point("current", "0.2.0")
    (device.inbox / "ready").unlink()
    assert device.run() == "0.1.0" == device.runs()
    assert store.refused("0.2.0")


@pytest.mark.parametrize(
    ("shown", "healthy"),
    [
        (["NRestarts=0\nActiveState=activating\n", "NRestarts=0\nActiveState=active\n"], True),
        (["NRestarts=0\nActiveState=active\n", "NRestarts=1\nActiveState=active\n"], False),
        (["NRestarts=0\nActiveState=failed\n"], False),
    ],
)
def test_a_client_that_is_restarted_is_not_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: list[str], healthy: bool
) -> None:
    """systemctl as it prints, number of restarts first; the last answer stays."""
    for index, text in enumerate(shown):
        (tmp_path / f"answer-{index}").write_text(text)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        f"#!/bin/sh\ncd {tmp_path}\ncat answer-0\n[ -f answer-1 ] && mv answer-1 answer-0\nexit 0\n"
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "HOLD_SECONDS", 0.05)
    monkeypatch.setattr(systemd, "_POLL_SECONDS", 0.02)
    assert systemd.SystemdService(tmp_path).healthy() is healthy
