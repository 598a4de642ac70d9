"""Small client bundles, and a service that is well or sick as a test wants."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

TARGET = "bookworm-arm64"


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
    description = {
        "version": described or version,
        "target": target,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["bundle.json"] = json.dumps(description).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
