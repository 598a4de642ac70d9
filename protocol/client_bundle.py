"""A client bundle as a file: what may be in one, and whether it is whole. Nothing is written here.

bundle.json         version, target, Python, and the digest of every other file
site/ bin/ systemd/ share/
"""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from protocol.client_release import MAX_BUNDLE_BYTES, ClientBundle, ClientRelease
from protocol.errors import ProtocolError

DESCRIPTION = "bundle.json"
MAX_UNPACKED = 2**28
MAX_FILES = 10_000
DAMAGED = (tarfile.TarError, lzma.LZMAError, EOFError)
"""What reading a member raises when the bundle is damaged or cut short."""
_BLOCK = 2**20


class UnusableBundle(ProtocolError):
    """A bundle is not what it says; the message says why."""


@dataclass(frozen=True)
class Member:
    """A plain file in a bundle.

    Attributes:
        path: relative, and never above the bundle.
        program: whether it may be run.
        content: to be read before the next member.
    """

    path: PurePosixPath
    program: bool
    content: IO[bytes]


def members(bundle: IO[bytes]) -> Iterator[Member]:
    """The files in a bundle, within the bounds of any client.

    Args:
        bundle: a tar.xz, open for reading.

    Raises:
        UnusableBundle: it is damaged, too large, or holds something else than plain files of its own.
    """
    files = size = 0
    try:
        with lzma.open(bundle) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for entry in archive:
                files, size = files + 1, size + entry.size
                if files > MAX_FILES or size > MAX_UNPACKED:
                    raise UnusableBundle("the bundle unpacks to more than any client")
                # By hand, since Bookworm's Python 3.11.2 has no extraction filters.
                path = PurePosixPath(entry.name)
                source = archive.extractfile(entry) if entry.isfile() else None
                if source is None or path.is_absolute() or ".." in path.parts or not path.parts:
                    raise UnusableBundle(f"the bundle holds {entry.name!r}, which is no plain file in it")
                with source:
                    yield Member(path, bool(entry.mode & 0o100), source)
            # The archive ends before its compressed form does, which may be cut short.
            while rest := unpacked.read(_BLOCK):
                size += len(rest)
                if size > MAX_UNPACKED:
                    raise UnusableBundle("the bundle unpacks to more than any client")
    except (*DAMAGED, ValueError) as error:
        raise UnusableBundle(f"the bundle is damaged: {error}") from error


def described(bundle: IO[bytes]) -> tuple[str, ClientBundle]:
    """Reads a whole bundle and checks every file in it; returns its version and what a release says of it.

    Raises:
        UnusableBundle: it is damaged, cut short, too large, or no client.
    """
    whole = hashlib.sha256()
    size = 0
    while block := bundle.read(_BLOCK):
        size += len(block)
        if size > MAX_BUNDLE_BYTES:
            raise UnusableBundle(f"the bundle is larger than {MAX_BUNDLE_BYTES:,} bytes")
        whole.update(block)
    bundle.seek(0)
    digests, description = {}, b""
    try:
        for member in members(bundle):
            if str(member.path) == DESCRIPTION:
                description = member.content.read(_BLOCK)
            else:
                digests[str(member.path)] = _digest(member.content)
    except DAMAGED as error:
        raise UnusableBundle(f"the bundle is damaged: {error}") from error
    try:
        found = json.loads(description)
        version, target, files = found["version"], found["target"], dict(found["files"])
        bundle_of = ClientBundle(target=target, sha256=whole.hexdigest(), size=size)
        ClientRelease(version=version, bundles=(bundle_of,))
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableBundle("the bundle is no client: `make bundle` makes them") from error
    if files != digests:
        odd = sorted(name for name in files.keys() | digests if files.get(name) != digests.get(name))
        raise UnusableBundle(f"{odd[0]} in the bundle is damaged")
    return version, bundle_of


def _digest(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := content.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
