"""`covey flash` onto image files, folders and a loop device; fsck.vfat and mtools judge the result."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from aggregator.cli import app
from deploy.flash import card
from deploy.flash.card import WriteError, verify_image, write_image
from deploy.flash.fat import BootPartitionError, FatPartition
from deploy.flash.source import BLOCK, Image, ImageError

PROGRAMS = ("mcopy", "sfdisk", "mkfs.vfat", "xz")
pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in PROGRAMS), reason="needs mtools, fdisk, dosfstools and xz"
)
START, SECTORS = 8_192, 65_536
CMDLINE = "console=tty1 root=PARTUUID=c0fe7001-02 rootwait\n"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8 me"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image with the layout of Raspberry Pi OS: MBR, a FAT partition, and one more."""
    folder = tmp_path_factory.mktemp("stock")
    image = folder / "stock.img"
    with image.open("wb") as file:
        file.truncate((START + SECTORS + 16_384) * 512)
        file.seek((START + SECTORS) * 512)
        file.write(os.urandom(2**20))
    table = f"label: dos\nstart={START}, size={SECTORS}, type=c\nstart={START + SECTORS}, type=83\n"
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)
    subprocess.run(
        ["mkfs.vfat", "-n", "bootfs", f"--offset={START}", image, str(SECTORS // 2)],
        check=True,
        capture_output=True,
    )
    for name, text in {"cmdline.txt": CMDLINE, "config.txt": "", "user-data": "", "meta-data": ""}.items():
        (folder / name).write_text(text)
        subprocess.run(["mcopy", "-i", f"{image}@@{START * 512}", folder / name, f"::{name}"], check=True)
    return image


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "covey-0.1.0-bookworm-arm64.tar.xz"
    path.write_bytes(os.urandom(300_000))
    return path


def flash(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["flash", *map(str, arguments)], input=stdin)


def boot_file(image: Path, name: str) -> bytes:
    drive = f"{image}@@{START * 512}"
    return subprocess.run(["mtype", "-i", drive, f"::{name}"], check=True, capture_output=True).stdout


def assert_sound(image: Path, folder: Path) -> None:
    """The FAT is whole, and every byte outside it is the stock image's."""
    fat = folder / "fat.img"
    with image.open("rb") as file:
        file.seek(START * 512)
        fat.write_bytes(file.read(SECTORS * 512))
    done = subprocess.run(["fsck.vfat", "-n", fat], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("form", ["img", "xz", "zip"])
def test_every_form_of_image_becomes_one_that_sets_itself_up(
    form: str, stock: Path, bundle: Path, tmp_path: Path
) -> None:
    image = packed(stock, form, tmp_path)
    key = tmp_path / "id.pub"
    key.write_text(KEY + "\n")
    tickets = tmp_path / "tickets"
    lines = [ticket("barn-1"), ticket("barn-2")]
    tickets.write_text("\n".join(lines))
    done = flash(
        image, "--out", tmp_path / "card-{n}.img", "--count", 2, "--tickets", tickets,
        "--bundle", bundle, "--ssh-key", key, "--wifi", "orchard:SE", "--broker", "mqtts://hub.example",
        "--sha256", hashlib.sha256(image.read_bytes()).hexdigest(), stdin="correct horse\n",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "cloud-init sets it up" in done.output
    instances = set()
    for number, line in enumerate(lines, 1):
        out = tmp_path / f"card-{number}.img"
        assert_sound(out, tmp_path)
        assert yaml.safe_load(boot_file(out, "user-data"))["hostname"] == f"barn-{number}"
        assert boot_file(out, "covey/enrolment.ticket").decode() == line + "\n"
        assert boot_file(out, f"covey/{bundle.name}") == bundle.read_bytes()
        assert b"COVEY_BROKER=mqtts://hub.example:8883" in boot_file(out, "covey/edge.env")
        instances.add(boot_file(out, "cmdline.txt").decode().removeprefix(CMDLINE.strip()))
        with stock.open("rb") as before, out.open("rb") as after:
            for start, size in ((0, START * 512), ((START + SECTORS) * 512, 8 * 2**20)):
                before.seek(start)
                after.seek(start)
                assert before.read(size) == after.read(size)
    assert len(instances) == 2, "each card is an instance of its own"
    assert not list(tmp_path.glob(".*"))


def ticket(name: str, number: int = 1) -> str:
    return f"covey+https://hub.example:8443/{name}#{number:012x}_{'ab' * 32}.{'cd' * 32}"


def packed(stock: Path, form: str, folder: Path) -> Path:
    if form == "img":
        return stock
    path = folder / f"stock.img.{form}"
    if form == "xz":
        path.write_bytes(lzma.compress(stock.read_bytes(), preset=0))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(stock, "2026/stock.img")
    assert Image.open(path).size == stock.stat().st_size
    return path


def test_a_mounted_boot_partition_is_provisioned_in_place(bundle: Path, tmp_path: Path) -> None:
    boot = tmp_path / "bootfs"
    boot.mkdir()
    (boot / "cmdline.txt").write_text(CMDLINE)
    (boot / "config.txt").write_text("")
    done = flash(
        "--boot-dir", boot, "--hostname", "barn-1", "--broker", "mqtts://hub.example", "--bundle", bundle
    )
    assert done.exit_code == 0, done.output
    assert "firstrun sets it up" in done.output
    assert (boot / "covey/setup.sh").is_file() and not (boot / "covey/enrolment.ticket").exists()
    assert "systemd.run=/boot/firmware/firstrun.sh" in (boot / "cmdline.txt").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--sha256", "0" * 64), "another checksum"),
        (("--sha256", "abc"), "64 hexadecimal digits"),
        (("--hostname", "Barn_1"), "no host name"),
        (("--broker", "http://hub"), "no broker address"),
        (("--broker", "mqtt://hub.example"), "unencrypted"),
        (("--data", "relative"), "absolute path"),
        (("--mechanism", "wishes"), "wishes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    change: tuple[str, str], reason: str, stock: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "card.img"
    options = {"--hostname": "barn-1", "--broker": "mqtts://hub.example", "--bundle": str(bundle)}
    options[change[0]] = change[1]
    done = flash(stock, "--out", out, *(word for pair in options.items() for word in pair))
    assert done.exit_code in (1, 2) and reason in " ".join(done.output.split())
    assert not out.exists()


def test_a_damaged_download_and_an_image_without_fat_leave_no_card(tmp_path: Path, bundle: Path) -> None:
    cut = tmp_path / "cut.img.xz"
    cut.write_bytes(lzma.compress(os.urandom(2**20))[:-200])
    with pytest.raises(ImageError, match="download it again"):
        Image.open(cut)
    empty = tmp_path / "empty.img"
    empty.write_bytes(bytes(2**20))
    with pytest.raises(BootPartitionError):
        FatPartition(empty)
    rest = ("--hostname", "a", "--broker", "mqtts://hub.example", "--bundle", bundle)
    assert flash(empty, "--out", tmp_path / "card.img", *rest).exit_code == 1
    assert not (tmp_path / "card.img").exists()


def test_a_partition_that_is_full_is_an_error_and_not_half_a_client(stock: Path, tmp_path: Path) -> None:
    image = tmp_path / "card.img"
    shutil.copy(stock, image)
    with pytest.raises(BootPartitionError, match="full"):
        FatPartition(image).write({"covey/large": os.urandom(SECTORS * 512)})


def test_each_device_needs_a_ticket_of_its_own(stock: Path, bundle: Path, tmp_path: Path) -> None:
    rest = ("--hostname", "barn-{n}", "--out", tmp_path / "{n}.img", "--bundle", bundle, "--ticket", "-")
    one, two = ticket("barn-1"), ticket("barn-2")
    for count, lines, reason in (
        (3, (one, two), "there are 2"),
        (2, (one, one), "twice"),
        (2, (two, one), "barn-1 would get the ticket of barn-2"),
        (1, ("one",), "not an enrolment ticket"),
    ):
        done = flash(stock, *rest, "--count", count, stdin="\n".join(lines))
        assert done.exit_code == 1 and reason in done.output
    done = flash(stock, *rest, "--count", 1, "--wifi", "orchard", stdin=one)
    assert done.exit_code == 1 and "--wifi-password-file" in done.output


def test_a_card_that_loses_a_bit_is_found_out(tmp_path: Path) -> None:
    content = os.urandom(BLOCK + 12_345)
    path = tmp_path / "card"
    with card.opened(path) as descriptor:
        size, digest = write_image(descriptor, [content[:BLOCK], bytes(BLOCK), content[BLOCK:]])
        assert size == len(content) + BLOCK
        verify_image(descriptor, size, digest)
        os.pwrite(descriptor, bytes([content[77] ^ 1]), 77)
        with pytest.raises(WriteError, match="does not hold"):
            verify_image(descriptor, size, digest)
        os.ftruncate(descriptor, size - 1)
        with pytest.raises(WriteError, match="does not hold"):
            verify_image(descriptor, size, digest)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A block device of this test's own, where the machine lets us have one."""
    backing = tmp_path / "disk"
    with backing.open("wb") as file:
        file.truncate(64 * 2**20)
    done = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this machine gives no loop device")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_card_is_erased_only_after_its_name_was_typed(
    loop: Path, stock: Path, bundle: Path, tmp_path: Path
) -> None:
    arguments = (
        stock, "--device", loop, "--hostname", "barn-1", "--broker", "mqtts://hub.example",
        "--bundle", bundle,
    )  # fmt: skip
    refused = flash(*arguments, stdin="yes\n")
    assert refused.exit_code == 3 and "nothing was written" in refused.output
    assert (tmp_path / "disk").read_bytes().count(0) == 64 * 2**20
    done = flash(*arguments, stdin=f"{loop.name}\n")
    assert done.exit_code == 0, done.output
    assert "verifying" in done.output
    assert_sound(tmp_path / "disk", tmp_path)
    assert yaml.safe_load(boot_file(loop, "user-data"))["hostname"] == "barn-1"


def test_a_mounted_disk_and_a_disk_that_is_too_small_are_refused(
    loop: Path, stock: Path, bundle: Path
) -> None:
    rest = ("--hostname", "a", "--broker", "mqtts://hub.example", "--bundle", bundle)
    subprocess.run(["mkfs.ext4", "-q", "-F", loop], check=True, capture_output=True)
    point = bundle.parent / "mounted"
    point.mkdir()
    if subprocess.run(["mount", loop, point], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        done = flash(stock, "--device", loop, *rest, stdin=f"{loop.name}\n")
        assert done.exit_code == 3 and f"umount {point}" in done.output.replace("\n", "")
        # Even told that it is free, the kernel does not give a mounted disk to a second writer.
        with pytest.raises(WriteError, match="alone"), card.opened(loop):
            pass
    finally:
        subprocess.run(["umount", point], check=True)
    large = bundle.parent / "large.img"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)
    done = flash(large, "--device", loop, *rest, stdin=f"{loop.name}\n")
    assert done.exit_code == 3 and "the image" in done.output
