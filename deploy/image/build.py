"""From the root file system to an image: MBR, FAT32 `bootfs`, ext4 `rootfs`, as Raspberry Pi OS has them.

So what flashes Raspberry Pi OS flashes this too, and a test of the one says something of the other. Neither
loop devices nor mounts are needed: partitions are made inside the image file by their offsets.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from deploy.bundle.build import EPOCH
from deploy.image.root import ImageError
from deploy.programs import missing_programs

SECTOR = 512
BOOT_START, BOOT_SECTORS = 8_192, 524_288
"""The FAT partition: from 4 MiB, 256 MiB."""
ROOT_START = BOOT_START + BOOT_SECTORS
DISK_ID = "c0fe7001"
"""The MBR's signature; partitions are named by it (PARTUUID=c0fe7001-02)."""
KERNEL, INITRD = "kernel8.img", "initrd.img"
_UUID = "c0fe7001-0000-4000-8000-000000000002"
_LABELS = {"boot": "bootfs", "root": "rootfs"}

_FSTAB = f"""\
PARTUUID={DISK_ID}-01  /boot/firmware  vfat  defaults,nofail  0  2
PARTUUID={DISK_ID}-02  /               ext4  defaults,noatime 0  1
"""
_CLOUD = """\
# What sets a device up lies on its FAT partition, and nowhere else is asked.
datasource_list: [NoCloud, None]
datasource:
  NoCloud:
    fs_label: bootfs
"""
CMDLINE = f"console=ttyAMA0,115200 root=PARTUUID={DISK_ID}-02 rootfstype=ext4 rootwait panic=10"
# A minimal boot partition that sets nothing up: cloud-init wants all three.
_BOOT_FILES = {
    "cmdline.txt": CMDLINE + "\n",
    "user-data": "#cloud-config\n{}\n",
    "meta-data": "instance-id: covey-unprovisioned\n",
    "network-config": 'version: 2\nethernets:\n  wired:\n    match:\n      name: "e*"\n    dhcp4: true\n',
}


def build_image(archive: Path, out: Path, *, root_mib: int = 1_536) -> None:
    """Makes the image of a root file system; a device grows it to its card at the first boot.

    Args:
        archive: from `root_archive`.
        out: the image; replaced when it is there.
        root_mib: size of the root partition.

    Raises:
        ImageError: a program is missing or fails, or the root does not fit.
    """
    programs = {"sfdisk": "fdisk", "mkfs.vfat": "dosfstools", "mcopy": "mtools", "mke2fs": "e2fsprogs"}
    if missing := missing_programs(programs):
        raise ImageError(missing)
    if os.geteuid() != 0:
        raise ImageError("the root file system has files of root: run this as root")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with tempfile.TemporaryDirectory(prefix="covey-image-") as folder:
            root = Path(folder) / "root"
            root.mkdir()
            _run("tar", "--extract", "--numeric-owner", "--xattrs", "-f", str(archive), "-C", str(root))
            boot = _boot_files(root)
            _configure(root)
            with partial.open("wb") as file:
                file.truncate(ROOT_START * SECTOR + root_mib * 2**20)
            _partition(partial, root_mib)
            _fill_boot(partial, boot)
            _fill_root(partial, root, root_mib)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def _boot_files(root: Path) -> dict[str, bytes]:
    try:
        kernel = sorted((root / "boot").glob("vmlinuz-*"))[-1]
        initrd = sorted((root / "boot").glob("initrd.img-*"))[-1]
    except IndexError as error:
        raise ImageError("the root file system has no kernel: build it anew") from error
    files = {name: text.encode() for name, text in _BOOT_FILES.items()}
    files |= {KERNEL: kernel.read_bytes(), INITRD: initrd.read_bytes()}
    initrd.unlink()  # on the FAT partition is where it is read from
    return files


def _configure(root: Path) -> None:
    (root / "boot/firmware").mkdir(exist_ok=True)
    (root / "etc/fstab").write_text(_FSTAB)
    (root / "etc/cloud/cloud.cfg.d/99-covey.cfg").write_text(_CLOUD)
    (root / "etc/hostname").write_text("covey\n")
    # Empty, so that every device makes its own at the first boot.
    (root / "etc/machine-id").write_text("")
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    resolver = root / "etc/resolv.conf"
    resolver.unlink(missing_ok=True)
    resolver.symlink_to("/run/systemd/resolve/stub-resolv.conf")


def _partition(image: Path, root_mib: int) -> None:
    table = (
        f"label: dos\nlabel-id: 0x{DISK_ID}\n"
        f"start={BOOT_START}, size={BOOT_SECTORS}, type=c\n"
        f"start={ROOT_START}, size={root_mib * 2048}, type=83\n"
    )
    _run("sfdisk", "--quiet", str(image), stdin=table)


def _fill_boot(image: Path, files: dict[str, bytes]) -> None:
    _run(
        "mkfs.vfat", "-F", "32", "-s", "2", "-n", _LABELS["boot"], "--invariant",
        f"--offset={BOOT_START}", str(image), str(BOOT_SECTORS * SECTOR // 1024),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="covey-boot-") as folder:
        for name, content in sorted(files.items()):
            path = Path(folder) / name
            path.write_bytes(content)
            os.utime(path, (EPOCH, EPOCH))
            _run("mcopy", "-m", "-i", f"{image}@@{BOOT_START * SECTOR}", str(path), f"::{name}")


def _fill_root(image: Path, root: Path, root_mib: int) -> None:
    for path in [root, *root.rglob("*")]:
        if path.lstat().st_mtime > EPOCH:
            os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    _run(
        "mke2fs", "-q", "-t", "ext4", "-L", _LABELS["root"], "-U", _UUID, "-m", "1", "-d", str(root),
        "-E", f"offset={ROOT_START * SECTOR},hash_seed={_UUID},lazy_itable_init=0",
        str(image), f"{root_mib}M",
    )  # fmt: skip
    _still_clocks(image, root)


def _still_clocks(image: Path, root: Path) -> None:
    # A file's change and birth times are those of this build; only the file system's own debugger sets them.
    fields = [f"{field} @{EPOCH}" for field in ("ctime", "atime", "crtime")]
    paths = ["/", "/lost+found", *(f"/{path.relative_to(root).as_posix()}" for path in root.rglob("*"))]
    script = "".join(f'sif "{path}" {field}\n' for path in paths for field in fields)
    _run("debugfs", "-w", "-f", "-", f"{image}?offset={ROOT_START * SECTOR}", stdin=script)


def _run(*command: str, stdin: str | None = None) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "E2FSPROGS_FAKE_TIME": str(EPOCH)}
    done = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ImageError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
