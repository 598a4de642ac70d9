"""The device's sources of examples, as `edge.toml` names them: Covey's own, and other packages' plug-ins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from edge_client.configuration import DataTable, InvalidConfiguration
from edge_client.events import Fault
from edge_client.sources import PLUGIN_GROUP, DataSource, SourceFactory
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest

DIRECTORY = "data"
"""In the state directory: a folder for each table, for what its source records."""

# By name here and not by entry point: to read those costs a device a megabyte for good, and no other package
# can take these names over.
BUILTIN: Final = MappingProxyType(
    {
        "npz": ("edge_client.adapters.data", "open_npz"),
        "csv": ("edge_client.adapters.sources.csv_files", "open_csv"),
        "sqlite": ("edge_client.adapters.sources.sqlite_table", "open_sqlite"),
        "mqtt": ("edge_client.adapters.sources.mqtt_sensors", "open_mqtt"),
        "iio": ("edge_client.adapters.sources.iio", "open_iio"),
    }
)


def find_plugin(name: str) -> SourceFactory:
    """The factory of a source by its name in `edge.toml`; its module is imported now.

    Raises:
        InvalidConfiguration: there is none of this name, several, or it cannot be imported.
    """
    if name in BUILTIN:
        module, factory = BUILTIN[name]
        found: SourceFactory = getattr(import_module(module), factory)
        return found
    from importlib.metadata import entry_points

    points = entry_points(group=PLUGIN_GROUP, name=name)
    if len(points) != 1:
        known = sorted({*BUILTIN, *(point.name for point in entry_points(group=PLUGIN_GROUP))})
        what = f"{len(points)} installed packages bring a" if points else "there is no"
        raise InvalidConfiguration(f"data: {what} source {name}; known are {', '.join(known)}")
    (point,) = points
    try:
        loaded: SourceFactory = point.load()
    except Exception as error:  # another project's code: whatever it raises, its name must be said
        raise InvalidConfiguration(f"data: the plug-in {point.value} of {name} fails: {error!r}") from error
    return loaded


@dataclass(frozen=True)
class Table:
    """An opened `[[data]]` table."""

    name: str
    model: str | None
    source: DataSource


class Sources:
    """All sources of a device as one: the tables of a model one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tuple(tables)

    def fault(self) -> Fault | None:
        """The first table's reason, when no table has anything."""
        faults = [table.source.fault() for table in self._tables]
        return None if None in faults else faults[0]

    def load(self, manifest: ModelManifest) -> Examples:
        """Joins the examples of every table for the model; see `DataSource.load`."""
        parts = []
        for table in self._tables:
            if table.model in (None, manifest.name):
                try:
                    parts.append(table.source.load(manifest))
                except InvalidExamples as error:
                    raise InvalidExamples(f"data {table.name}: {error}") from error
        if not parts:
            raise InvalidExamples(f"no [[data]] table of edge.toml is for the model {manifest.name}")
        if len(parts) == 1:
            return parts[0]
        if len({(part.y.dtype, part.y.shape[1:]) for part in parts}) != 1:
            raise InvalidExamples("the [[data]] tables have targets of different kinds")
        return Examples(
            "device", np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        )

    def start(self) -> None:
        """Begins to record."""
        for table in self._tables:
            table.source.start()

    def stop(self) -> None:
        """Ends all recording."""
        for table in self._tables:
            table.source.stop()


def open_sources(tables: Sequence[DataTable], state: Path) -> Sources:
    """Opens what `edge.toml` names; nothing is recorded before `start`.

    Args:
        tables: at least one.
        state: the state directory.

    Raises:
        InvalidConfiguration: a source is not known, or its keys cannot be used.
    """
    names = [table.name or table.source for table in tables]
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfiguration(f"data: two tables are called {name}: give each a `name` of its own")
    return Sources(
        [
            Table(name, table.model, find_plugin(table.source)(table.options, state / DIRECTORY / name))
            for name, table in zip(names, tables, strict=True)
        ]
    )
