"""A Raspberry Pi-class machine under full-system emulation, booted from an image's own FAT partition."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from deploy.image.build import BOOT_START, INITRD, KERNEL, SECTOR

HOST = "10.0.2.2"
"""What the guest calls this machine, through QEMU's user network."""


def missing_programs() -> list[str]:
    """What must be installed before a machine can be started."""
    return [name for name in ("qemu-system-aarch64", "mcopy") if shutil.which(name) is None]


class Machine:
    """One emulated machine, as a context manager; its disk is the image, changed in place.

    Example:
        with Machine(image, folder) as machine:
            machine.wait_for("login:", seconds=300)
            machine.reset()
    """

    def __init__(
        self, image: Path, folder: Path, *, memory_mib: int = 1024, ssh_port: int | None = None
    ) -> None:
        """Describes a machine; entering the context powers it on.

        Args:
            image: made by `deploy.image`.
            folder: for kernel, log and control socket; its path must be short (a socket lies in it).
            memory_mib: main memory.
            ssh_port: a free port of this machine's loopback that leads to the guest's SSH server.
        """
        self._forward = "" if ssh_port is None else f",hostfwd=tcp:127.0.0.1:{ssh_port}-:22"
        self._image, self._folder, self._memory = image, folder, memory_mib
        self.log = folder / "serial.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: tuple[socket.socket, IO[bytes]] | None = None

    def __enter__(self) -> Self:
        """Powers on."""
        for name in (KERNEL, INITRD, "cmdline.txt"):
            source = f"{self._image}@@{BOOT_START * SECTOR}"
            subprocess.run(
                ["mcopy", "-o", "-i", source, f"::{name}", str(self._folder / name)], check=True, timeout=60
            )
        control = self._folder / "qmp"
        self._process = subprocess.Popen(
            [
                "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2",
                "-m", str(self._memory),
                "-accel", "tcg,thread=multi", "-display", "none", "-no-user-config",
                "-kernel", str(self._folder / KERNEL), "-initrd", str(self._folder / INITRD),
                "-append", (self._folder / "cmdline.txt").read_text().strip(),
                "-drive", f"file={self._image},format=raw,if=virtio,cache=writeback",
                "-netdev", f"user,id=net{self._forward}", "-device", "virtio-net-pci,netdev=net,romfile=",
                "-device", "virtio-rng-pci",
                "-serial", f"file:{self.log}", "-qmp", f"unix:{control},server=on,wait=off",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._control = self._connect(control)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cuts the power."""
        if self._control is not None:
            self._control[0].close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)

    def reset(self) -> None:
        """Presses the reset button: nothing is flushed, nobody is asked."""
        self._command("system_reset")

    def text(self) -> str:
        """All that the serial console has shown."""
        return self.log.read_bytes().decode(errors="replace") if self.log.exists() else ""

    def wait_for(self, words: str, seconds: float) -> float:
        """Waits until the serial console shows these words; returns the seconds it took."""
        return self.wait_until(lambda: words in self.text(), seconds, f"the console shows {words!r}")

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Waits until something outside holds, while the machine runs; returns the seconds it took."""
        start = time.monotonic()
        while not condition():
            assert self._process is not None and self._process.poll() is None, "the machine went off"
            if time.monotonic() - start > seconds:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.text()[-4000:]}")
            time.sleep(0.5)
        return time.monotonic() - start

    def _connect(self, path: Path) -> tuple[socket.socket, IO[bytes]]:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        for _ in range(100):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                connection.connect(str(path))
                break
            time.sleep(0.1)
        stream = connection.makefile("rwb")
        stream.readline()  # its greeting
        self._control = (connection, stream)
        self._command("qmp_capabilities")
        return self._control

    def _command(self, name: str, *, skip: Sequence[str] = ("event",)) -> None:
        assert self._control is not None
        stream = self._control[1]
        stream.write(json.dumps({"execute": name}).encode() + b"\n")
        stream.flush()
        while any(word in (answer := json.loads(stream.readline())) for word in skip):
            pass
        assert "return" in answer, answer
