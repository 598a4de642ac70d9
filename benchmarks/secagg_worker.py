"""What the workers of `benchmarks/secagg_server.py` run besides the product: as little as the product's."""

from __future__ import annotations

import time
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident set that this process ever had (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM on this system")


def warm(_: int) -> None:
    """Keeps a worker busy for long enough that every one of them gets one of these."""
    time.sleep(0.5)


def peak_later(_: int) -> int:
    """A worker's peak; as `warm`, one for each."""
    time.sleep(0.2)
    return peak_bytes()
