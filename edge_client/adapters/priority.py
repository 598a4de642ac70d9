"""Gives way to whatever else wants the machine: setpriority(2), and ioprio_set(2), which no library calls."""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress

NICE = 10
_IDLE_CLASS = 3 << 13
_THIS_PROCESS = 1
# The number of ioprio_set, by machine and the size of a pointer: a 32-bit system may run on a 64-bit kernel.
_IOPRIO_SET = {
    ("x86_64", 8): 251,
    ("x86_64", 4): 289,
    ("i686", 4): 289,
    ("aarch64", 8): 30,
    ("aarch64", 4): 314,
    ("armv7l", 4): 314,
    ("armv6l", 4): 314,
    ("riscv64", 8): 30,
}


def give_way() -> None:
    """Takes the processor at nice 10, and the disk when nobody else wants it, as the unit has it.

    What is lower already stays. Threads and processes that begin later have the same; where a sandbox or
    another system forbids it, nothing happens.
    """
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) < NICE:
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
    number = _IOPRIO_SET.get((os.uname().machine, struct.calcsize("P")))
    if number is not None:
        with suppress(OSError, AttributeError):  # no syscall(2) to call
            ctypes.CDLL(None).syscall(number, _THIS_PROCESS, 0, _IDLE_CLASS)
