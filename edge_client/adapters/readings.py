"""Reads what the owner declared, when a query asks for it: files of this machine, and the data directory."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, assert_never

from numpy.lib import format as npy

from edge_client.adapters.files import storage_errors, write_durably
from edge_client.fields import (
    ConstantSource,
    DeclaredFields,
    FileSource,
    RecordingSource,
    UnreadableField,
    summarise,
)

_NPY: Any = npy  # numpy does not type it
FIELDS = "fields.json"
MAX_FILE_BYTES = 65_536
"""Of a file with readings; what is longer is no sensor."""


def load_fields(directory: Path) -> DeclaredFields:
    """Reads the owner's declaration in a state directory; no fields when there is none.

    Raises:
        InvalidFields: the file declares nothing that can be understood.
        StorageError: it cannot be read.
    """
    path = directory / FIELDS
    if not path.exists():
        return DeclaredFields(fields={})
    with storage_errors(f"reading {path}"):
        return DeclaredFields.from_bytes(path.read_bytes())


def save_fields(directory: Path, fields: DeclaredFields) -> None:
    """Writes the owner's declaration.

    Raises:
        StorageError: it cannot be written.
    """
    write_durably(directory / FIELDS, [fields.to_bytes()])


class FieldReader:
    """The fields of one device, as their owner declares them at the moment."""

    def __init__(self, state: Path, data: Path | None) -> None:
        """Looks for the declaration in `state`, and for recordings in `data` if there is such a directory."""
        self._state, self._data = state, data

    def declared(self) -> frozenset[str]:
        """Names of the fields that may be asked for.

        Raises:
            InvalidFields, StorageError: the declaration cannot be used.
        """
        return frozenset(load_fields(self._state).fields)

    def read(self, name: str) -> float:
        """The value of a field now; it may be NaN or infinite, if its source says so.

        Raises:
            UnreadableField: it is not declared (any more), or its source gives no number.
            InvalidFields, StorageError: the declaration cannot be used.
        """
        source = load_fields(self._state).fields.get(name)
        if source is None:
            raise UnreadableField("the owner does not declare it any more")
        if isinstance(source, ConstantSource):
            return source.value
        if isinstance(source, FileSource):
            return summarise(_numbers(Path(source.path)), source.summary, source.scale)
        if isinstance(source, RecordingSource):
            if self._data is None:
                raise UnreadableField("no data directory is given: use --data")
            return summarise(_recordings(self._data), source.summary, source.scale)
        assert_never(source)


def _numbers(path: Path) -> list[float]:
    """Every number of a text file, separated by white space.

    The errors name no content: they may travel to the aggregator.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableField(f"its file cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableField(f"its file is longer than {MAX_FILE_BYTES} bytes")
    try:
        readings = [float(word) for word in data.split()]
    except ValueError:
        raise UnreadableField("its file holds something that is no number") from None
    # One that is not finite must not hide in a median or a maximum.
    return readings if all(map(math.isfinite, readings)) else [math.nan]


def _recordings(directory: Path) -> list[float]:
    """Examples of each NPZ file, in the order of the names; only the headers are read."""
    return [float(_examples(path)) for path in sorted(directory.glob("*.npz"))]


def _examples(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as file:
            header = (
                _NPY.read_array_header_1_0 if _NPY.read_magic(file) == (1, 0) else _NPY.read_array_header_2_0
            )
            shape = header(file)[0]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UnreadableField("a recording in the data directory cannot be read") from error
    if not shape:
        raise UnreadableField("a recording in the data directory holds no examples")
    return int(shape[0])
