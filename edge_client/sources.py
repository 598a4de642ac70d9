"""What a source of examples is: the contract of the plug-ins in the entry point group `covey.data`. Pure.

A plug-in is a callable that takes the keys of its `[[data]]` table and a directory of its own, and returns a
`DataSource`. `edge_client.windows` makes examples of readings, and `edge_client.adapters.recordings` keeps
what a sensor gives; a plug-in may use both, or neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from edge_client.events import Fault
from models.examples import Examples
from models.manifest import ModelManifest

PLUGIN_GROUP = "covey.data"


class DataSource(Protocol):
    """Where examples come from. Nothing that it reads leaves the device."""

    def fault(self) -> Fault | None:
        """Why there is nothing to train on right now, without reading it all.

        The aggregator may be told: it names no file, no column and no value.
        """
        ...

    def load(self, manifest: ModelManifest) -> Examples:
        """Reads the examples for one model, on the worker's thread.

        Raises:
            InvalidExamples: there are none, or they are not what the model takes.
        """
        ...

    def start(self) -> None:
        """Begins to record, when the daemon starts; a source of what is already there does nothing."""
        ...

    def stop(self) -> None:
        """Ends recording, and makes durable what was recorded; it takes at most a few seconds."""
        ...


class SourceFactory(Protocol):
    """What an entry point of `covey.data` names."""

    def __call__(self, options: Mapping[str, Any], directory: Path) -> DataSource:
        """Makes the source of one `[[data]]` table.

        Args:
            options: the keys of the table, without `source` and `model`; not checked yet.
            directory: in the state directory, for this source alone; it may not exist yet.

        Raises:
            InvalidConfiguration: the options cannot be used (`Section.of` raises it).
        """
        ...
