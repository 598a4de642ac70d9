"""Which disk may be overwritten: rules over what `lsblk` says. Pure, so that every rule is tested.

The kernel's removable flag is not asked: card readers lie about it in both directions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LSBLK = ("lsblk", "--json", "--bytes", "--output", "PATH,TYPE,SIZE,MODEL,FSTYPE,RO,MOUNTPOINTS")
SIZE_LIMIT = 256 * 10**9
"""Bytes of the largest card that is written to without being told."""
_SYSTEM_MOUNTS = frozenset({"/", "/boot", "/boot/efi", "/boot/firmware", "/usr", "/var", "/home"})
_POOLS = {
    "LVM2_member": "belongs to LVM",
    "linux_raid_member": "belongs to a RAID",
    "zfs_member": "belongs to ZFS",
    "crypto_LUKS": "is an encrypted volume",
}
_WITHIN = {
    "lvm": "belongs to LVM",
    "crypt": "is an open encrypted volume",
    "dm": "is used by the device mapper",
}


class RefusedTarget(ValueError):
    """This disk is not written to; the message says why, and what to do."""


@dataclass(frozen=True)
class Disk:
    """A block device and what is on it.

    Attributes:
        path: as /dev/sdb.
        kind: lsblk's TYPE: disk, part, lvm, raid1, crypt, loop, ...
        size: bytes.
        mounts: where it is mounted; "[SWAP]" for swap space in use.
    """

    path: str
    kind: str
    size: int
    model: str = ""
    filesystem: str = ""
    read_only: bool = False
    mounts: tuple[str, ...] = ()
    children: tuple[Disk, ...] = ()

    def __iter__(self) -> Iterator[Disk]:
        """This device, and all that is on it at any depth."""
        yield self
        for child in self.children:
            yield from child

    def __str__(self) -> str:
        """For the eyes of whoever is about to erase it."""
        return f"{self.path}, {self.model or 'unnamed'}, {self.size / 1e9:.1f} GB"


def read_disks(text: str) -> tuple[Disk, ...]:
    """Reads what the command `LSBLK` prints.

    Raises:
        RefusedTarget: it is not that; then nothing is known, and nothing may be written.
    """
    try:
        return tuple(_disk(entry) for entry in json.loads(text)["blockdevices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedTarget("what lsblk says cannot be read: util-linux 2.37 or later is needed") from error


def _disk(entry: dict[str, Any]) -> Disk:
    return Disk(
        path=str(entry["path"]),
        kind=str(entry["type"]),
        size=int(str(entry["size"])),
        model=str(entry.get("model") or "").strip(),
        filesystem=str(entry.get("fstype") or ""),
        read_only=entry["ro"] in (True, 1, "1"),
        mounts=tuple(str(mount) for mount in entry["mountpoints"] if mount),
        children=tuple(_disk(child) for child in entry.get("children") or ()),
    )


def check_target(disks: Sequence[Disk], path: str, needed: int, *, system_drives: bool = False) -> Disk:
    """The disk of this path, when it may be overwritten.

    Args:
        disks: what this machine has.
        path: with symbolic links resolved.
        needed: bytes of the image.
        system_drives: allow disks above the size limit and of a pool; never what is mounted.

    Raises:
        RefusedTarget: it may not.
    """
    disk = next((disk for disk in disks if disk.path == path), None)
    if disk is None:
        if any(part.path == path for whole in disks for part in whole):
            raise RefusedTarget(f"{path} is a part of a disk: name the whole disk")
        raise RefusedTarget(f"there is no disk {path}: `lsblk` lists what there is")
    if disk.kind not in ("disk", "loop"):
        raise RefusedTarget(f"{path} is no disk but of the type {disk.kind}")
    if disk.read_only:
        raise RefusedTarget(f"{path} is read-only: a card has a switch at its side")
    if disk.size < needed:
        raise RefusedTarget(f"{path} has {disk.size / 1e9:.1f} GB, the image {needed / 1e9:.1f} GB")
    for part in disk:
        for mount in part.mounts:
            if mount == "[SWAP]":
                raise RefusedTarget(f"{part.path} is this machine's swap space")
            if mount in _SYSTEM_MOUNTS:
                raise RefusedTarget(f"{part.path} is this machine's {mount}")
            raise RefusedTarget(f"{part.path} is mounted on {mount}: unmount it first (umount {mount})")
    if system_drives:
        return disk
    for part in disk:
        raid = "belongs to a RAID" if part.kind.startswith("raid") else ""
        reason = raid or _WITHIN.get(part.kind) or _POOLS.get(part.filesystem)
        if reason:
            raise RefusedTarget(f"{part.path} {reason}; --enable-writing-system-drives overwrites it")
    if disk.size > SIZE_LIMIT:
        raise RefusedTarget(
            f"{disk} is larger than any usual card; --enable-writing-system-drives overwrites it"
        )
    return disk
