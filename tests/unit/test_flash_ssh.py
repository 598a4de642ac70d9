"""The way over SSH: what reaches the device's shell, and when an update counts as taken.

The whole of it against a real SSH server is `tests/e2e/test_real_device.py`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from deploy.flash.ssh import Remote, RemoteError, install, update

TARGET = "bookworm-arm64"


class Device(Remote):
    """A device that answers from what it is said to have, and notes what it is told."""

    def __init__(self, has: str = "", settled: tuple[str, ...] = (), version: str = "0.1.0") -> None:
        super().__init__("me@barn-1")
        object.__setattr__(self, "has", has)
        object.__setattr__(self, "settled", iter(settled))
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "told", [])

    def run(self, script: str, stdin: bytes = b"") -> bytes:
        self.told.append((script, stdin))  # type: ignore[attr-defined]
        if "bundle.json" in script:
            return json.dumps({"version": self.version, "target": TARGET}).encode()  # type: ignore[attr-defined]
        if "echo installed" in script:
            return self.has.encode()  # type: ignore[attr-defined,no-any-return]
        if "readlink" in script:
            return next(self.settled).encode()  # type: ignore[attr-defined,no-any-return]
        return b"request" if "device.csr" in script else b""


def bundles(folder: Path, *, signed: bool = True) -> tuple[Path, ...]:
    names = [f"covey-0.2.0-{target}.tar.xz" for target in ("trixie-arm64", TARGET)]
    for name in names:
        (folder / name).write_bytes(name.encode())
        if signed:
            (folder / f"{name}.release.json").write_text("signed")
    return tuple(folder / name for name in names)


def test_root_reads_nothing_in_the_clients_directory() -> None:
    """The client could have put a link there, to a file of root's or to one without an end."""
    device = Device()
    install(device, {}, lambda request: b"bundle", ticket=False)
    (script,) = (script for script, _ in device.told if "device.csr" in script)  # type: ignore[attr-defined]
    assert script.startswith("exec setpriv --reuid=covey --regid=covey --clear-groups head -c ")


def test_a_script_reaches_the_device_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"ssh": 'for last; do :; done\nexec sh -c "$last"\n', "id": "echo 0\n"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    remote = Remote("me@barn-1")
    script = """printf '%s|' "it's" '$HOME' "a  b" `echo c`; cat"""
    assert remote.run(script, b"in\0put") == b"it's|$HOME|a  b|c|in\0put"
    with pytest.raises(RemoteError, match="last lines above"):
        remote.run("exit 3")
    with pytest.raises(RemoteError, match="cannot be reached"):
        remote.run("exit 255")
    with pytest.raises(RemoteError, match="names no device"):
        Remote("-oProxyCommand=touch x").run("true")


def test_only_what_is_missing_is_done() -> None:
    whole = Device("installed\nenrolled\n")
    assert not install(whole, {"covey/setup.sh": b""}, lambda _: b"", ticket=True)
    assert len(whole.told) == 2 and not any(stdin for _, stdin in whole.told)  # type: ignore[attr-defined]
    waiting = Device("installed\n")
    assert not install(waiting, {}, lambda request: b"bundle of " + request, ticket=False)
    assert waiting.told[-1][1] == b"bundle of request"  # type: ignore[attr-defined]
    fresh = Device()
    assert install(fresh, {"covey/setup.sh": b"script"}, lambda _: b"bundle", ticket=False)
    with tarfile.open(fileobj=io.BytesIO(fresh.told[1][1])) as archive:  # type: ignore[attr-defined]
        assert archive.getnames() == ["covey/setup.sh"]


def test_an_update_is_waited_for_and_one_that_was_not_taken_is_an_error(tmp_path: Path) -> None:
    found = bundles(tmp_path)
    taken = Device(settled=("", "", "versions/0.2.0\n"))
    assert update(taken, found, lambda: True) == "0.2.0"
    offered = next(stdin for _, stdin in taken.told if stdin)  # type: ignore[attr-defined]
    with tarfile.open(fileobj=io.BytesIO(offered)) as archive:
        content = archive.extractfile("bundle.tar.xz")
        assert content is not None and content.read() == f"covey-0.2.0-{TARGET}.tar.xz".encode()
    with pytest.raises(RemoteError, match=r"0\.2\.0 was not taken, 0\.1\.0 runs"):
        update(Device(settled=("", "versions/0.1.0\n")), found, lambda: True)
    with pytest.raises(RemoteError, match="still being tried"):
        update(Device(), found, lambda: False)


def test_nothing_is_offered_that_is_unsigned_or_there_already(tmp_path: Path) -> None:
    assert update(Device(version="0.2.0"), bundles(tmp_path), lambda: True) is None
    for release in tmp_path.glob("*.json"):
        release.unlink()
    assert update(Device(), bundles(tmp_path, signed=False), lambda: True) is None
