"""The lock of a device's state directory: whoever holds it is alone with the state."""

from __future__ import annotations

import time
from pathlib import Path

from edge_client import cli
from edge_client.adapters.files import Lock

LOCK = "lock"
LOCK_SECONDS = 1.0


def locked(state: Path) -> Lock:
    """The lock of a device's state: as long as it is held, no client runs.

    Raises:
        cli.CommandFailed: one runs.
    """
    lock = Lock(state / LOCK)
    give_up = time.monotonic() + LOCK_SECONDS
    while not lock.acquire():
        # `status` holds the lock for a moment to see whether somebody runs.
        if time.monotonic() >= give_up:
            raise cli.CommandFailed(f"another covey-edge runs on {state}: stop it first", cli.EXIT_RUNNING)
        time.sleep(0.05)
    return lock


def is_running(state: Path) -> bool:
    """Whether a client runs on a state directory."""
    if not (state / LOCK).exists():
        return False
    lock = Lock(state / LOCK)
    free = lock.acquire()
    lock.release()
    return not free
