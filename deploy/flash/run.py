"""What `covey flash` does, without the command line: cards, image files and mounted boot partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from deploy.flash.card import find_target, opened, verify_image, write_image
from deploy.flash.fat import BootFolder, BootPartition, FatPartition
from deploy.flash.firstboot import Mechanism, Provision, ProvisionError, boot_files, choose_mechanism
from deploy.flash.source import Image
from deploy.flash.targets import RefusedTarget
from protocol.enrolment import EnrolmentTicket

NUMBER = "{n}"


def device_names(
    tickets: Sequence[EnrolmentTicket | None], pattern: str | None, count: int, start: int = 1
) -> Sequence[str]:
    """Names of so many devices: those of their tickets, else a pattern: `barn-{n}` counts from `start`.

    Raises:
        ProvisionError: several devices would have the same name, or one has another in the fleet.
    """
    known = [ticket.name for ticket in tickets if ticket is not None]
    if pattern is None and known:
        return known
    names = _counted(pattern or f"covey-{NUMBER}", count, start)
    for name, its_ticket in zip(names, known, strict=False):
        if name != its_ticket:
            raise ProvisionError(
                f"{name} would get the ticket of {its_ticket}: leave --hostname out, or make others"
            )
    return names


def _counted(pattern: str, count: int, start: int) -> Sequence[str]:
    if count > 1 and NUMBER not in pattern:
        raise ProvisionError(f"{count} devices need {NUMBER} in their name, as barn-{NUMBER}")
    return [pattern.replace(NUMBER, str(number)) for number in range(start, start + count)]


def write_file(
    image: Image, out: Path, provision: Provision, files: Mapping[str, bytes], mechanism: Mechanism | None
) -> Mechanism:
    """Makes a provisioned image file; it appears under its name when it is whole.

    Returns:
        The mechanism that will set the device up.

    Raises:
        ImageError, WriteError, BootPartitionError, ProvisionError: it says what to do.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with opened(partial) as descriptor, bar(f"writing {out}", image.size) as step:
            write_image(descriptor, image.blocks(), step)
        used = provision_boot(FatPartition(partial), provision, files, mechanism)
        partial.rename(out)
        return used
    finally:
        partial.unlink(missing_ok=True)


def write_card(
    image: Image,
    device: Path,
    provision: Provision,
    files: Mapping[str, bytes],
    mechanism: Mechanism | None,
    *,
    ask: Callable[[str], str],
    verify: bool = True,
    system_drives: bool = False,
) -> Mechanism:
    """Erases a card and writes a provisioned image onto it.

    Args:
        image: what is written.
        device: the whole disk.
        provision: what the device gets.
        files: Covey's own, by path.
        mechanism: as `provision_boot` takes it.
        ask: shows a question, returns what was typed; the name of the device lets it be erased.
        verify: read everything back.
        system_drives: as `check_target` takes it.

    Returns:
        The mechanism that will set the device up.

    Raises:
        RefusedTarget: this disk is not written to, or another name was typed.
        ImageError, WriteError, BootPartitionError, ProvisionError: it says what to do.
    """
    disk = find_target(device, image.size, system_drives=system_drives)
    if ask(f"This erases everything on {disk}. Type {device.name} to go on") != device.name:
        raise RefusedTarget(f"{device} was not confirmed: nothing was written")
    with opened(device) as descriptor:
        with bar(f"writing {device}", image.size) as step:
            size, digest = write_image(descriptor, image.blocks(), step)
        if verify:
            with bar("verifying", size) as step:
                verify_image(descriptor, size, digest, step)
        # Still held: a desktop that mounts the card now would write to the same partition.
        return provision_boot(FatPartition(device), provision, files, mechanism)


def write_folder(
    folder: Path, provision: Provision, files: Mapping[str, bytes], mechanism: Mechanism | None
) -> Mechanism:
    """Provisions a boot partition that is mounted as a folder.

    Returns:
        The mechanism that will set the device up.

    Raises:
        BootPartitionError, ProvisionError: it says what to do.
    """
    return provision_boot(BootFolder(folder), provision, files, mechanism)


def provision_boot(
    boot: BootPartition, provision: Provision, files: Mapping[str, bytes], mechanism: Mechanism | None
) -> Mechanism:
    """Writes what a device needs onto its boot partition: Covey's files first, what starts them last.

    Args:
        boot: the partition.
        provision: what the device gets.
        files: Covey's own, by path.
        mechanism: who sets the device up; None chooses by what the partition holds.

    Returns:
        The mechanism.
    """
    chosen = mechanism or choose_mechanism(boot.names())
    top = boot_files(chosen, provision, boot.read("cmdline.txt").decode())
    boot.write(files)
    boot.write(top)
    return chosen


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress in bytes on standard error; yields what is told of each step."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
