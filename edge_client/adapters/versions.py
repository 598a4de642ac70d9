"""Installed clients, as folders that are never changed, and the links that say which one is used.

    /opt/covey/versions/0.1.0/   a whole bundle
    /opt/covey/current           what the service runs
    /opt/covey/good              the last one that stood its trial; the updater itself runs from here
    /opt/covey/previous          the good one before it
    /opt/covey/trial             version and number of attempts, while one is tried
    /opt/covey/refused/0.2.0     failed its trial: it is not tried again
    /opt/covey/sequences         the highest sequences of assignments that were taken: no older one counts
    /opt/covey/outcome           what became of the last update (`edge_client.installed`)

Root owns all of it, so that the client cannot change what it runs. A folder or link gets its name when its
content is durable, by a rename: after a power cut each of them is the old one or the new one.
"""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from edge_client.adapters.files import sync_directory
from edge_client.installed import AUDIENCES, OUTCOME, Audience, Outcome
from edge_client.updating import Link
from protocol.client_bundle import DAMAGED, UnusableBundle, members
from protocol.client_release import MAX_BUNDLE_BYTES

_LINKS: tuple[Link, ...] = ("current", "good", "previous")
_BLOCK = 2**20


@dataclass(frozen=True)
class Trial:
    """A version that has to prove itself.

    Attributes:
        attempts: how often it was started for that.
    """

    version: str
    attempts: int


class Versions:
    """The folder of clients."""

    def __init__(self, folder: Path) -> None:
        """Takes /opt/covey, or another folder in tests."""
        self._folder = folder
        (folder / "versions").mkdir(parents=True, exist_ok=True)
        (folder / "refused").mkdir(exist_ok=True)

    def path(self, version: str) -> Path:
        """Where a version is."""
        return self._folder / "versions" / version

    def linked(self, link: Link) -> str | None:
        """The version that a link names; None when it names none that is there."""
        path = self._folder / link
        return path.readlink().name if path.is_symlink() and path.is_dir() else None

    def point(self, link: Link, version: str) -> None:
        """Lets a link name another version."""
        aside = self._folder / f".{link}.new"
        aside.unlink(missing_ok=True)
        aside.symlink_to(Path("versions") / version)
        aside.replace(self._folder / link)
        sync_directory(self._folder)

    def installed(self) -> set[str]:
        """Versions that are there as a whole."""
        return {path.name for path in (self._folder / "versions").iterdir() if path.name[0] != "."}

    def install(self, version: str, bundle: Path) -> None:
        """Unpacks a bundle as a version, unless it is there.

        Args:
            version: its name.
            bundle: a file that only root can write, whose signature was checked.

        Raises:
            UnusableBundle: it is damaged, or holds another version.
        """
        if version in self.installed():
            return
        partial = self.path(f".{version}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _unpack(bundle, partial)
            _check(partial, version)
            _compile(partial, self.path(version))
        except (*DAMAGED, ValueError, KeyError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UnusableBundle(f"the bundle of {version} is damaged: {error}") from error
        except UnusableBundle:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _flush(partial)
        partial.rename(self.path(version))
        sync_directory(self._folder / "versions")

    def trial(self) -> Trial | None:
        """What is being tried."""
        try:
            version, attempts = (self._folder / "trial").read_text().split()
            return Trial(version, int(attempts))
        except FileNotFoundError:
            return None

    def begin_trial(self, version: str, attempts: int) -> None:
        """Notes what is being tried."""
        self._note(self._folder / "trial", f"{version} {attempts}\n")

    def end_trial(self) -> None:
        """Notes that nothing is."""
        (self._folder / "trial").unlink(missing_ok=True)
        sync_directory(self._folder)

    def refuse(self, version: str, reason: str) -> None:
        """Notes that a version failed its trial."""
        self._note(self._folder / "refused" / version, reason + "\n")

    def refused(self, version: str) -> bool:
        """Whether a version failed its trial."""
        return (self._folder / "refused" / version).exists()

    def sequences(self) -> dict[Audience, int]:
        """The highest sequence that was taken, of the fleet's assignments and of this device's own."""
        try:
            found = json.loads((self._folder / "sequences").read_text())
        except FileNotFoundError:
            return {}
        return {audience: int(found[audience]) for audience in AUDIENCES if audience in found}

    def note_sequence(self, audience: Audience, sequence: int) -> None:
        """Notes that an assignment was taken."""
        self._note(self._folder / "sequences", json.dumps(self.sequences() | {audience: sequence}) + "\n")

    def note_outcome(self, outcome: Outcome) -> None:
        """Notes what became of an update."""
        self._note(self._folder / OUTCOME, outcome.to_text())

    def prune(self) -> None:
        """Removes what no link names and nothing tries, and what was left half done."""
        trial = self.trial()
        kept = {self.linked(link) for link in _LINKS}
        kept.add(trial.version if trial else None)
        for path in (self._folder / "versions").iterdir():
            if path.name not in kept:
                # Under a hidden name first: a power cut must not leave half a folder under a version's name.
                hidden = path if path.name[0] == "." else path.with_name(f".{path.name}")
                if hidden != path:
                    shutil.rmtree(hidden, ignore_errors=True)
                    path.rename(hidden)
                shutil.rmtree(hidden)

    def _note(self, path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.new")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.replace(path)
        sync_directory(path.parent)


def take(source: Path, target: Path) -> tuple[str, int]:
    """Copies a file that the client wrote to where only root can change it.

    Args:
        source: followed through no symbolic link.
        target: replaced.

    Returns:
        SHA-256 and size of what was copied.

    Raises:
        UnusableBundle: it is no plain file, or too large.
    """
    digest, size = hashlib.sha256(), 0
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnusableBundle(f"cannot open {source.name}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file, target.open("wb") as copy:
        while block := file.read(_BLOCK):
            size += len(block)
            if size > MAX_BUNDLE_BYTES:
                raise UnusableBundle(f"{source.name} is larger than any bundle")
            digest.update(block)
            copy.write(block)
    return digest.hexdigest(), size


def _unpack(bundle: Path, folder: Path) -> None:
    with bundle.open("rb") as source:
        for member in members(source):
            path = folder / member.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(member.content, file)
            path.chmod(0o755 if member.program else 0o644)


def _check(folder: Path, version: str) -> None:
    described = json.loads((folder / "bundle.json").read_text())
    if described["version"] != version:
        raise UnusableBundle(f"the bundle holds {described['version']}, not {version}")
    for name, expected in described["files"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UnusableBundle(f"{name} in the bundle is damaged")


def _compile(folder: Path, path: Path) -> None:
    """Makes the bytecode that the launcher asks for; else every start would compile all of it again."""
    compileall.compile_dir(
        folder / "site", quiet=2, optimize=2, stripdir=str(folder), prependdir=str(path), workers=1
    )


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
