"""Small client bundles, and a service that is well or sick as a test wants."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

TARGET = "bookworm-arm64"
OWN_TARGET = "this-machine"
CRASH = b"\n\ndef run(options: object) -> None:\n    raise SystemExit('this client crashes')\n"


class FakeService:
    """A service that stays up for the versions that are well."""

    def __init__(self, folder: Path, sick: set[str] = frozenset(), broken: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.folder, self.sick, self.broken = folder, sick, broken
        self.started: list[str] = []

    def self_test(self, version: Path) -> str | None:
        return "it does not start" if version.name in self.broken else None

    def start(self, version: Path) -> None:
        self.started.append(version.name)

    def healthy(self) -> bool:
        return (self.folder / "current").readlink().name not in self.sick


def bundle(version: str, described: str | None = None, target: str = TARGET, padding: bytes = b"") -> bytes:
    """A bundle as `deploy.bundle` makes it, with a few files in place of the client's."""
    files = {
        "bin/covey-edge": f"version {version}".encode(),
        "site/edge.py": b"'Not kept.'\n",
        "systemd/covey-edge.service": b"[Unit]\n",
        "site/padding": padding,
    }
    return _packed(version, target, files, described)


def _packed(version: str, target: str, files: dict[str, bytes], described: str | None = None) -> bytes:
    description = {
        "version": described or version,
        "target": target,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as archive:
        for name, content in (files | {"bundle.json": json.dumps(description).encode()}).items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if name.startswith("bin/") else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def revised(bundle: Path, version: str, changes: Mapping[str, Callable[[bytes], bytes]]) -> bytes:
    """A real bundle as another version, with some of its files changed; quickly packed, so larger.

    Args:
        bundle: made by `deploy.bundle`.
        version: of the new one.
        changes: path in the bundle -> what becomes of the file's content.
    """
    module = "site/edge_client/__init__.py"
    said = f'__version__ = "{version}"'.encode()
    own = {module: lambda content: re.sub(rb'__version__ = ".*"', said, content)}
    changes = own | dict(changes)
    files: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(bundle, "r:xz") as archive:
        for entry in archive:
            source = archive.extractfile(entry)
            assert source is not None
            content = source.read()
            files.append((entry, changes[entry.name](content) if entry.name in changes else content))
    assert {entry.name for entry, _ in files} > changes.keys()
    digests = {entry.name: hashlib.sha256(content).hexdigest() for entry, content in files}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as archive:
        for entry, content in files:
            if entry.name == "bundle.json":
                described = json.loads(content) | {"version": version}
                described["files"] = {name: digests[name] for name in described["files"]}
                content = json.dumps(described).encode()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def own_bundle(version: str, *, sick: bool = False) -> bytes:
    """This machine's own client as a bundle; its packages are those of the interpreter that runs the tests.

    Args:
        version: of the client.
        sick: whether it crashes when it runs, though it passes its self-test.
    """
    project = Path(__file__).parents[1]
    files = {
        f"site/{path.relative_to(project)}": path.read_bytes()
        for package in ("protocol", "models", "edge_client")
        for path in (project / package).rglob("*.py")
        if not {"layers", "architectures", "zoo", "datasets"} & set(path.parts)
    }
    files["site/edge_client/__init__.py"] = f'__version__ = "{version}"\n'.encode()
    if sick:
        files["site/edge_client/commands/running.py"] += CRASH
    launcher = 'here=$(dirname "$(dirname "$(readlink -f "$0")")")\nexport PYTHONPATH="$here/site"\n'
    files["bin/covey-edge"] = (
        f'#!/bin/sh\n{launcher}exec {sys.executable} -m edge_client.main "$@"\n'.encode()
    )
    files["systemd/covey-edge.service"] = b"[Unit]\n"
    return _packed(version, OWN_TARGET, files)
