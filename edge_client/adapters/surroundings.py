"""Reads the circumstances of this device from /sys and /proc: power, heat, load, memory, and the link.

What a kernel does not say, or says unreadably, is unknown; nothing here fails.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from protocol.conditions import Conditions, Power

_PROCESSOR = re.compile(r"cpu|soc|x86_pkg|core", re.IGNORECASE)
_DEFAULT_ROUTE = "00000000"
_TERMINALS = ("pts/[0-9]*", "tty[0-9]*", "ttyS*", "ttyAMA*")


class Surroundings:
    """The device's own files about itself."""

    def __init__(
        self,
        root: Path = Path("/"),
        metered: Sequence[str] = (),
        unix: Callable[[], float] = time.time,
    ) -> None:
        """Describes where to look.

        Args:
            root: above `sys`, `proc` and `dev`; another folder in tests.
            metered: beginnings of the names of links that cost by the byte.
            unix: the clock by which the kernel notes when a terminal was used.
        """
        self._sys, self._proc, self._dev = root / "sys", root / "proc", root / "dev"
        self._metered, self._unix = tuple(metered), unix

    def read(self) -> Conditions:
        """The circumstances now; without the number of examples, which is nothing to read here."""
        power, battery = self._power()
        return Conditions(
            power=power,
            battery=battery,
            temperature=self._temperature(),
            load=self._load(),
            metered=self._is_metered(),
            idle_hours=self._idle_hours(),
            free_memory=self.free_memory(),
        )

    def cores(self) -> int:
        """Processors that are in use."""
        count = 0
        for part in (_text(self._sys / "devices/system/cpu/online") or "0").split(","):
            first, _, last = part.partition("-")
            if first.isdigit():
                count += int(last or first) - int(first) + 1
        return max(count, 1)

    def free_memory(self) -> int | None:
        """MiB that a program could have without swapping, as Linux estimates it."""
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(self._proc / "meminfo") or "", re.MULTILINE)
        return min(int(found[1]) // 1024, 2**31) if found else None

    def _power(self) -> tuple[Power | None, int | None]:
        """Whether it runs on mains, and the charge; of a battery that Linux does not know, neither."""
        charges, discharging, online = [], False, False
        for supply in _folders(self._sys / "class/power_supply"):
            kind = _text(supply / "type")
            if kind == "Battery":
                if _text(supply / "scope") == "Device":
                    continue  # of a mouse
                charge = _number(supply / "capacity")
                if charge is not None:
                    charges.append(min(max(int(charge), 0), 100))
                discharging |= _text(supply / "status") == "Discharging"
            elif _number(supply / "online"):
                online = True
        if discharging and not online:
            return "battery", min(charges, default=None)
        return ("mains" if online or charges else None), min(charges, default=None)

    def _temperature(self) -> float | None:
        """Of the hottest part of the processor; of anything, when no sensor says that it is there."""
        found: list[tuple[bool, float]] = []
        for zone in _folders(self._sys / "class/thermal"):
            value = _number(zone / "temp") if zone.name.startswith("thermal_zone") else None
            if value is not None and -100_000 <= value <= 200_000:
                found.append((bool(_PROCESSOR.search(_text(zone / "type") or "")), value / 1000))
        return max(found, default=(False, None))[1]

    def _load(self) -> float | None:
        first, _, _ = (_text(self._proc / "loadavg") or "").partition(" ")
        try:
            return min(max(float(first) / self.cores(), 0.0), 10_000.0)
        except ValueError:
            return None

    def _idle_hours(self) -> float | None:
        """Since somebody typed at a terminal, as `w` finds it; at most since the start."""
        first, _, _ = (_text(self._proc / "uptime") or "").partition(" ")
        try:
            idle = float(first)
        except ValueError:
            return None
        for pattern in _TERMINALS:
            for terminal in self._dev.glob(pattern):
                with suppress(OSError):  # its session has ended
                    idle = min(idle, self._unix() - terminal.stat().st_atime)
        return round(min(max(idle, 0.0) / 3600, 100_000.0), 1)

    def _is_metered(self) -> bool | None:
        """Whether the default route goes over such a link; None without one."""
        links = set(self._default_links())
        return any(link.startswith(self._metered) for link in links) if links else None

    def _default_links(self) -> Iterator[str]:
        for line in (_text(self._proc / "net/route") or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 7 and fields[1] == fields[7] == _DEFAULT_ROUTE:
                yield fields[0]
        for line in (_text(self._proc / "net/ipv6_route") or "").splitlines():
            fields = line.split()
            if len(fields) == 10 and fields[0].strip("0") == "" and fields[1] == "00" and fields[9] != "lo":
                yield fields[9]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
