"""Sensors that Linux drives: Industrial I/O devices, read through sysfs at a fixed period.

A value is `in_<channel>_input` where the driver converts it, else `(raw + offset) * scale`, in the units of
the kernel's documentation (Documentation/ABI/testing/sysfs-bus-iio): m/s^2, rad/s, milli degrees Celsius, kPa
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from edge_client.adapters.sources.recorded import RecordedSettings, RecordedSource, Sample, SensorError

DEVICES = "/sys/bus/iio/devices"
MAX_FILE_BYTES = 4_096
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9_-]*")


class IioSettings(RecordedSettings):
    """The keys of a `[[data]]` table with the source `iio`.

    `channels` and `targets` are named as in sysfs, without `in_`: accel_x, anglvel_z, temp, voltage0.
    `label` is a text file with the label of now, which some program of the owner's writes.

    Attributes:
        device: the name that its driver gives it, or its folder, such as iio:device0.
        root: where the devices are.
    """

    device: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/]+$")]
    root: Annotated[str, Field(pattern=r"^/")] = DEVICES


def open_iio(options: Mapping[str, Any], directory: Path) -> RecordedSource:
    """The plug-in `iio`."""
    settings = IioSettings.of(dict(options), "data (iio)")
    return RecordedSource(settings, directory, IioSampler(settings))


class IioSampler:
    """Reads the channels of one device; it is looked for anew after each error."""

    def __init__(self, settings: IioSettings) -> None:
        self._settings = settings
        self._channels: list[_Channel] | None = None

    def start(self) -> None:
        """Nothing is to be begun."""

    def stop(self) -> None:
        """Nothing was begun."""

    def units(self) -> Mapping[str, str]:
        """The kernel's own, which do not change."""
        return {}

    def sample(self, steady: float) -> Sample:
        """Reads every channel, and the label's file."""
        try:
            if self._channels is None:
                folder = find_device(Path(self._settings.root), self._settings.device)
                self._channels = [_Channel.of(folder, name) for name in self._settings.columns]
            values = tuple(channel.read() for channel in self._channels)
        except SensorError:
            self._channels = None
            raise
        label = self._settings.label
        return Sample(values, None if label is None else _label(Path(label)))


def find_device(root: Path, name: str) -> Path:
    """The folder of a device by its name.

    Raises:
        SensorError: there is none, or several.
    """
    names = {}
    for folder in sorted(root.glob("iio:device*")):
        try:
            names[folder] = _text(folder / "name")
        except SensorError:
            names[folder] = ""
    found = [folder for folder, own in names.items() if name in (own, folder.name)]
    if len(found) != 1:
        there = ", ".join(f"{own} ({folder.name})" for folder, own in names.items()) or "none"
        raise SensorError(f"{len(found)} devices in {root} are called {name}; there are: {there}")
    return found[0]


class _Channel:
    """One channel: its file, and what its reading is shifted and multiplied by."""

    def __init__(self, path: Path, offset: float, scale: float) -> None:
        self._path, self._offset, self._scale = path, offset, scale

    @classmethod
    def of(cls, folder: Path, name: str) -> _Channel:
        if not _CHANNEL.fullmatch(name):
            raise SensorError(f"{name!r} is no channel: write accel_x, temp or voltage0")
        if (folder / f"in_{name}_input").exists():
            return cls(folder / f"in_{name}_input", 0.0, 1.0)
        raw = folder / f"in_{name}_raw"
        if not raw.exists():
            there = sorted({re.sub(r"_(raw|input)$", "", p.name)[3:] for p in folder.glob("in_*_[ri][an]*")})
            raise SensorError(f"{folder.name} has no channel {name}; it has {', '.join(there)[:300]}")
        return cls(raw, _shared(folder, name, "offset", 0.0), _shared(folder, name, "scale", 1.0))

    def read(self) -> float:
        return (_number(self._path) + self._offset) * self._scale


def _shared(folder: Path, name: str, what: str, default: float) -> float:
    """An attribute of a channel, else of all of its kind: in_accel_x_scale, then in_accel_scale."""
    kind = re.sub(r"(_[a-z0-9]+|\d+)$", "", name)
    for path in (folder / f"in_{name}_{what}", folder / f"in_{kind}_{what}"):
        if path.exists():
            return _number(path)
    return default


def _number(path: Path) -> float:
    try:
        return float(_text(path))
    except ValueError:
        raise SensorError(f"{path} holds no number") from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace").strip()
    except OSError as error:
        raise SensorError(f"{path} cannot be read: {error.strerror}") from error


def _label(path: Path) -> str | None:
    try:
        return _text(path) or None
    except SensorError:
        return None  # nobody says what this is: a reading without a label
