"""The arm64 image: its layout, by the programs that know it, and that a build can be repeated."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from deploy.image.build import BOOT_SECTORS, BOOT_START, DISK_ID, ROOT_START, SECTOR, build_image
from deploy.image.root import ImageError, RootRecipe, default_cache, root_archive

ARCHIVE = default_cache() / f"root-{RootRecipe().suite}-{RootRecipe().digest()}.tar"


def test_every_part_of_a_recipe_names_another_root() -> None:
    recipes = [RootRecipe(), RootRecipe(suite="trixie"), RootRecipe(packages=("dbus",)), RootRecipe(layout=2)]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)


def test_a_root_in_the_cache_is_taken_and_nothing_is_built(tmp_path: Path) -> None:
    recipe = RootRecipe(packages=("nothing-that-debian-has",))
    cached = tmp_path / f"root-{recipe.suite}-{recipe.digest()}.tar"
    cached.write_bytes(b"a root")
    assert root_archive(recipe, tmp_path, Path("/nonexistent")) == cached
    cached.unlink()
    with pytest.raises(ImageError, match=r"--sources|missing|root"):
        root_archive(recipe, tmp_path, Path("/nonexistent"))
    assert not list(tmp_path.iterdir())


@pytest.mark.arm64
@pytest.mark.skipif(
    os.geteuid() != 0 or not ARCHIVE.exists(), reason="needs root, and a root file system in the cache"
)
def test_two_builds_have_the_same_bytes_and_sound_file_systems(tmp_path: Path) -> None:
    digests = []
    for name in ("first.img", "second.img"):
        image = tmp_path / name
        build_image(ARCHIVE, image)
        with image.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    assert digests[0] == digests[1]
    table = subprocess.run(["sfdisk", "--dump", image], capture_output=True, text=True, check=True).stdout
    assert f"label-id: 0x{DISK_ID}" in table
    assert [
        line.split("start=")[1].split(",")[0].strip() for line in table.splitlines() if "start=" in line
    ] == [
        str(BOOT_START),
        str(ROOT_START),
    ]
    boot, root = tmp_path / "boot", tmp_path / "root"
    _cut(image, boot, BOOT_START, BOOT_SECTORS)
    _cut(image, root, ROOT_START, None)
    subprocess.run(["fsck.vfat", "-n", boot], check=True, capture_output=True)
    subprocess.run(["e2fsck", "-f", "-n", root], check=True, capture_output=True)


def _cut(image: Path, out: Path, start: int, sectors: int | None) -> None:
    count = [] if sectors is None else [f"count={sectors // 2048}"]
    subprocess.run(
        [
            "dd",
            f"if={image}",
            f"of={out}",
            f"bs={SECTOR * 2048}",
            f"skip={start // 2048}",
            *count,
            "conv=sparse",
        ],
        check=True,
        capture_output=True,
    )
