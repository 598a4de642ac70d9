"""Which disks may be overwritten, by what lsblk said on real machines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.flash.targets import RefusedTarget, check_target, read_disks

GB = 10**9
IMAGE = 3 * GB


def block(path: str, kind: str = "disk", size: int = 32 * GB, **rest: Any) -> dict[str, Any]:
    return {
        "path": path, "type": kind, "size": size, "model": None, "fstype": None, "ro": False,
        "mountpoints": [None], **rest,
    }  # fmt: skip


LAPTOP = {
    "blockdevices": [
        block(
            "/dev/nvme0n1",
            size=512 * GB,
            model="Samsung SSD 980",
            children=[
                block("/dev/nvme0n1p1", "part", fstype="vfat", mountpoints=["/boot/efi"]),
                block(
                    "/dev/nvme0n1p2",
                    "part",
                    fstype="crypto_LUKS",
                    children=[
                        block(
                            "/dev/mapper/crypt",
                            "crypt",
                            fstype="LVM2_member",
                            children=[
                                block("/dev/mapper/vg-root", "lvm", fstype="ext4", mountpoints=["/"]),
                                block("/dev/mapper/vg-swap", "lvm", fstype="swap", mountpoints=["[SWAP]"]),
                            ],
                        )
                    ],
                ),
            ],
        ),
        block("/dev/sda", model="SD/MMC", children=[block("/dev/sda1", "part", fstype="vfat")]),
        block(
            "/dev/sdb",
            model="Ultra Fit",
            children=[block("/dev/sdb1", "part", fstype="vfat", mountpoints=["/media/me/PHOTOS"])],
        ),
        block("/dev/sdc", children=[block("/dev/sdc1", "part", fstype="linux_raid_member")]),
        block("/dev/sdd", children=[block("/dev/md0", "raid1", fstype="ext4")]),
        block("/dev/sde", size=4_000 * GB, model="Backup"),
        block("/dev/sdf", ro=True),
        block("/dev/sdg", size=1 * GB),
        block("/dev/sdh", children=[block("/dev/sdh1", "part", fstype="swap", mountpoints=["[SWAP]"])]),
        block("/dev/sdi", fstype="LVM2_member"),
        block("/dev/sr0", "rom", size=4 * GB),
    ]
}
DISKS = read_disks(json.dumps(LAPTOP))


def test_a_card_that_nobody_uses_is_taken() -> None:
    disk = check_target(DISKS, "/dev/sda", IMAGE)
    assert str(disk) == "/dev/sda, SD/MMC, 32.0 GB"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/nvme0n1", "/boot/efi"),
        ("/dev/nvme0n1p1", "name the whole disk"),
        ("/dev/mapper/vg-root", "part of a disk"),
        ("/dev/sdb", "umount /media/me/PHOTOS"),
        ("/dev/sdc", "RAID"),
        ("/dev/sdd", "RAID"),
        ("/dev/sde", "larger than any usual card"),
        ("/dev/sdf", "read-only"),
        ("/dev/sdg", r"1.0 GB, the image 3.0 GB"),
        ("/dev/sdh", "swap"),
        ("/dev/sdi", "LVM"),
        ("/dev/sr0", "no disk"),
        ("/dev/sdz", "there is no disk"),
    ],
)
def test_every_other_disk_is_refused_and_the_reason_said(path: str, reason: str) -> None:
    with pytest.raises(RefusedTarget, match=reason):
        check_target(DISKS, path, IMAGE)


def test_told_so_unused_pools_and_large_disks_are_taken_and_mounted_ones_still_not() -> None:
    for path in ("/dev/sdc", "/dev/sdd", "/dev/sde", "/dev/sdi"):
        assert check_target(DISKS, path, IMAGE, system_drives=True).path == path
    for path in ("/dev/nvme0n1", "/dev/sdb", "/dev/sdf", "/dev/sdg", "/dev/sdh"):
        with pytest.raises(RefusedTarget):
            check_target(DISKS, path, IMAGE, system_drives=True)


def test_root_deep_below_a_disk_is_found() -> None:
    inner = {**LAPTOP["blockdevices"][0], "children": [LAPTOP["blockdevices"][0]["children"][1]]}
    with pytest.raises(RefusedTarget, match="machine's /"):
        check_target(read_disks(json.dumps({"blockdevices": [inner]})), "/dev/nvme0n1", IMAGE)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"blockdevices": [{"path": "/dev/sda"}]}', '{"blockdevices": [1]}']
)
def test_what_is_not_understood_lets_nothing_be_written(text: str) -> None:
    with pytest.raises(RefusedTarget, match="lsblk"):
        read_disks(text)
