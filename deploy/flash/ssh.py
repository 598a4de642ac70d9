"""Installs the client on a device that runs already, over SSH, and enrols one that waits for its operator.

The way is OpenSSH's own program, with its agent, known hosts and configuration. The device makes its key;
what leaves it is the signing request, and what comes back is public.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.flash.firstboot import FOLDER

_SECONDS = 1_200
"""Longest wait for one command: a slow device unpacks and tries the client."""
# As root: the account need not be able to read the client's state.
_LOOK = (
    "[ -e /opt/covey/current ] && echo installed; [ -f /var/lib/covey/enrolment.json ] && echo enrolled; :"
)
_INSTALL = (
    "folder=$(mktemp -d /var/tmp/covey.XXXXXX) && trap 'rm -rf \"$folder\"' EXIT"
    f' && tar -x -C "$folder" && sh "$folder/{FOLDER}/setup.sh" >&2'
)
# As the client's user, and not without end: the client could have put a link there.
_REQUEST = "exec setpriv --reuid=covey --regid=covey --clear-groups head -c 4096 /var/lib/covey/device.csr"
_ENROL = (
    'file=$(mktemp) && trap \'rm -f "$file"\' EXIT && cat > "$file" && chmod 644 "$file"'
    " && setpriv --reuid=covey --regid=covey --clear-groups"
    ' /opt/covey/current/bin/covey-edge enroll --state /var/lib/covey --bundle "$file" >&2'
    ' && install -m 644 "$file" /etc/covey/enrolment.json'
    " && systemctl restart --no-block covey-edge.service covey-update.path"
)
# As the client's user: root must not write where the client could have put a link.
_OFFER = (
    "exec setpriv --reuid=covey --regid=covey --clear-groups sh -c"
    ' "umask 077; mkdir -p /var/lib/covey/updates && cd /var/lib/covey/updates && tar -x && touch ready"'
)
_INSTALLED = "cat /opt/covey/current/bundle.json"
_SETTLED = "[ ! -e /var/lib/covey/updates/ready ] && [ ! -e /opt/covey/trial ] && readlink /opt/covey/good; :"


class RemoteError(RuntimeError):
    """A device cannot be reached or set up over SSH; the message says what to do."""


@dataclass(frozen=True)
class Remote:
    """A device as `ssh` names it.

    Attributes:
        target: USER@HOST, or ssh://USER@HOST:PORT; the user is root or may use sudo without a password.
        config: an OpenSSH client configuration in place of the user's own.
    """

    target: str
    config: Path | None = None

    def run(self, script: str, stdin: bytes = b"") -> bytes:
        """Runs a shell script as root on the device; what it says goes to standard error as it comes.

        Args:
            script: for `sh`.
            stdin: its standard input.

        Returns:
            What it printed.

        Raises:
            RemoteError: SSH or the script failed.
        """
        if self.target.startswith("-"):
            raise RemoteError(f"{self.target!r} names no device")
        config = [] if self.config is None else ["-F", str(self.config)]
        quoted = "'" + script.replace("'", "'\\''") + "'"
        root = f'if [ "$(id -u)" = 0 ]; then exec sh -c {quoted}; else exec sudo -n sh -c {quoted}; fi'
        command = ["ssh", "-o", "BatchMode=yes", *config, self.target, root]
        try:
            done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=False, timeout=_SECONDS)
        except OSError as error:
            raise RemoteError(
                "the program ssh is missing; on Debian: apt-get install openssh-client"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise RemoteError(f"{self.target} did not finish within {_SECONDS // 60} minutes") from error
        if done.returncode == 255:
            raise RemoteError(f"{self.target} cannot be reached by ssh: try `ssh {self.target}` yourself")
        if done.returncode != 0:
            raise RemoteError(f"{self.target} failed; its last lines above say why")
        return done.stdout


def hostname(remote: Remote) -> str:
    """The device's own name."""
    return remote.run("uname -n").decode().strip().split(".")[0].lower()


def install(
    remote: Remote, files: Mapping[str, bytes], enrol: Callable[[bytes], bytes], *, ticket: bool
) -> bool:
    """Brings a running device to the point where its client runs in the fleet; what is done is left alone.

    Args:
        remote: the device.
        files: Covey's own, by path, as on a boot partition.
        enrol: makes an enrolment bundle of a signing request; asked only when there is no ticket.
        ticket: whether `files` hold one.

    Returns:
        Whether the client was installed now; False when it was there.

    Raises:
        RemoteError: it says what to do.
    """
    found = remote.run(_LOOK).split()
    fresh = b"installed" not in found
    if fresh or (ticket and b"enrolled" not in found):
        remote.run(_INSTALL, _archive(files))
    if b"enrolled" not in remote.run(_LOOK).split():
        remote.run(_ENROL, enrol(remote.run(_REQUEST)))
    return fresh


def update(remote: Remote, bundles: Sequence[Path], wait: Callable[[], bool]) -> str | None:
    """Offers a device the signed bundle for its system, and waits until it was tried.

    Args:
        remote: a device with a client.
        bundles: those with BUNDLE.release.json beside them are signed.
        wait: pauses; returns False when it was long enough.

    Returns:
        The version that the device runs then; None when there is nothing newer to offer.

    Raises:
        RemoteError: the device did not take it, or not in time.
    """
    described = json.loads(remote.run(_INSTALLED))
    for bundle in bundles:
        release = bundle.with_name(f"{bundle.name}.release.json")
        name = f"-{described['target']}.tar.xz"
        version = bundle.name.removeprefix("covey-").removesuffix(name)
        if not (bundle.name.endswith(name) and release.is_file()) or version == described["version"]:
            continue
        files = {"bundle.tar.xz": bundle.read_bytes(), "release.json": release.read_bytes()}
        remote.run(_OFFER, _archive(files))
        while wait():
            settled = remote.run(_SETTLED).decode().strip().rpartition("/")[2]
            if settled == version:
                return version
            if settled:
                raise RemoteError(
                    f"{version} was not taken, {settled} runs: journalctl -u covey-update says why"
                )
        raise RemoteError(f"{version} is still being tried: journalctl -u covey-update")
    return None


def _archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
