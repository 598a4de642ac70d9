"""The client as a service of systemd, for the updater: tried, started with its own units, watched."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

UNIT = "covey-edge.service"
UNITS = Path("/etc/systemd/system")
USER = "covey"
HOLD_SECONDS = 60.0
"""A client that runs so long without a restart is healthy; whether it reaches its broker is not asked."""
_TEST_SECONDS = 300
_POLL_SECONDS = 2.0


class SystemdService:
    """The service on this device; needs root."""

    def __init__(self, state: Path) -> None:
        """Takes the client's state directory."""
        self._state = state

    def self_test(self, version: Path) -> str | None:
        """Runs a version beside the one in use, as the client's user; returns why it fails, or None.

        It reads the state as the new version would, and changes nothing.
        """
        for arguments in (["--help"], ["status", "--state", str(self._state), "--json"]):
            try:
                done = subprocess.run(
                    [str(version / "bin" / "covey-edge"), *arguments],
                    capture_output=True,
                    text=True,
                    timeout=_TEST_SECONDS,
                    check=False,
                    user=USER,
                    group=USER,
                    extra_groups=[],
                    cwd="/",
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"covey-edge {arguments[0]}: {error}"
            if done.returncode != 0:
                return f"covey-edge {arguments[0]}: {done.stderr.strip()[-300:]}"
        return None

    def start(self, version: Path) -> None:
        """Starts the current version with the units of its own bundle."""
        for unit in sorted((version / "systemd").iterdir()):
            aside = UNITS / f".{unit.name}.new"
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(unit.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(UNITS / unit.name)
        subprocess.run(["systemctl", "daemon-reload"], check=False, timeout=120)
        subprocess.run(["systemctl", "reset-failed", UNIT], check=False, timeout=120)
        subprocess.run(["systemctl", "restart", "--no-block", UNIT], check=False, timeout=120)

    def healthy(self) -> bool:
        """Watches the service until it was up for `HOLD_SECONDS`; returns False when it ends before."""
        deadline = time.monotonic() + HOLD_SECONDS + _TEST_SECONDS
        since: float | None = None
        while time.monotonic() < deadline:
            shown = subprocess.run(
                ["systemctl", "show", "--property=ActiveState,NRestarts", UNIT],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            ).stdout
            # By name: systemd prints properties in an order of its own.
            state = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
            if state.get("ActiveState") == "failed" or state.get("NRestarts", "0") != "0":
                return False
            if state.get("ActiveState") != "active":
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since >= HOLD_SECONDS:
                return True
            time.sleep(_POLL_SECONDS)
        return False
