"""The root file system: Debian for arm64 from its own packages, made once and kept.

Configuring arm64 packages on another machine runs their scripts under emulation, which takes a quarter of an
hour; so the result is kept under the user's cache, by a digest of everything that decides what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.bundle.build import EPOCH
from deploy.programs import missing_programs

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_FORMAT = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

PACKAGES = (
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "udev",
    "dbus",
    "kmod",
    "iproute2",
    "ca-certificates",
    "python3",
    "netplan.io",
    "cloud-init",
    "initramfs-tools",
    "linux-image-cloud-arm64",
    "openssh-server",
    "sudo",
    "xz-utils",
    "e2fsprogs",
    "cloud-guest-utils",
    "fdisk",
)
"""What a device needs besides Covey's bundle: to boot, to be set up through its FAT partition, and Python."""


class ImageError(RuntimeError):
    """An image cannot be made; the message says what to do."""


@dataclass(frozen=True)
class RootRecipe:
    """Everything that decides what is in the root file system.

    Attributes:
        suite: the Debian release.
        packages: installed besides the essential ones.
        layout: raised when the way of building changes.
    """

    suite: str = "bookworm"
    packages: tuple[str, ...] = PACKAGES
    layout: int = 1

    def digest(self) -> str:
        """Names the cached root; the first 16 digits of a SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def default_cache() -> Path:
    """Where roots are kept: XDG_CACHE_HOME, so that another checkout finds them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "covey" / "image"


def root_archive(recipe: RootRecipe, cache: Path, sources: Path) -> Path:
    """The root as a tar archive; built when the cache has none for this recipe.

    Args:
        recipe: what is in it.
        cache: the folder of roots; made when it is not there.
        sources: this machine's list of Debian package sources, in either of apt's formats.

    Returns:
        The archive in the cache.

    Raises:
        ImageError: a program is missing, emulation is not to be had, or the build failed.
    """
    archive = cache / f"root-{recipe.suite}-{recipe.digest()}.tar"
    if archive.is_file():
        return archive
    _require("mmdebstrap", "arch-test")
    if os.geteuid() != 0:
        raise ImageError("the root file system has files of root: run this as root")
    if not sources.is_file():
        raise ImageError(f"there is no list of package sources {sources}: name one with --sources")
    enable_emulation()
    cache.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(f".{os.getpid()}.tar")
    command = [
        "mmdebstrap",
        "--mode=root",
        "--architectures=arm64",
        "--variant=minbase",
        f"--include={','.join(recipe.packages)}",
        f"--keyring={_KEYRING}",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        recipe.suite,
        str(partial),
        str(sources),
    ]
    try:
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)})
        partial.rename(archive)
    except subprocess.CalledProcessError as error:
        raise ImageError("mmdebstrap failed; its last lines above say why") from error
    finally:
        partial.unlink(missing_ok=True)
    return archive


def enable_emulation() -> None:
    """Lets this kernel run arm64 programs through qemu, where it cannot already.

    Raises:
        ImageError: the kernel, the package or the right to do so is missing.
    """
    if platform.machine() == "aarch64":
        return
    if not (_BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", _BINFMT], check=False)
    if (_BINFMT / "qemu-aarch64").exists():
        return
    try:
        lines = _FORMAT.read_text().splitlines()
        (_BINFMT / "register").write_text(next(line for line in lines if line.startswith(":")))
    except (OSError, StopIteration) as error:
        raise ImageError(
            "this machine cannot run arm64 programs: install qemu-user-static, and run this as root"
        ) from error


def _require(*programs: str) -> None:
    if missing := missing_programs(dict(zip(programs, programs, strict=True))):
        raise ImageError(missing)
