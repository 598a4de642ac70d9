"""Personal models on disk: one file for each model, replaced as a whole, and never read by what sends.

A file is a line of JSON, the record with the digest of what follows, and then all parameters as little-endian
float32; nothing follows a record of a personal model that was not better.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from edge_client.adapters.files import Lock, StorageError, private_directory, storage_errors, write_durably
from edge_client.personalisation import Personal, PersonalRecord
from models.manifest import ModelManifest

LOCK = ".lock"


class PersonalBusy(StorageError):
    """Another process personalises on this device."""


class PersonalFiles:
    """The folder of personal models."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes this process the only one that writes here, for as long as the block runs.

        Raises:
            PersonalBusy: another one does.
            StorageError: the file system refuses.
        """
        private_directory(self._directory)
        lock = Lock(self._directory / LOCK)
        if not lock.acquire():
            raise PersonalBusy(16, "another process personalises on this device: wait for it")
        try:
            yield
        finally:
            lock.release()

    def save(self, personal: Personal) -> None:
        """Replaces what there is for the model.

        Raises:
            StorageError: the write failed; what was there still is.
        """
        values = b"" if personal.weights is None else personal.weights.astype("<f4").tobytes()
        head = {"sha256": hashlib.sha256(values).hexdigest(), "record": personal.record.model_dump()}
        line = json.dumps(head, allow_nan=False).encode() + b"\n"
        write_durably(self._directory / personal.record.model, [line, values])

    def load(self, manifest: ModelManifest) -> Personal | None:
        """What there is for exactly this version; None if that is nothing, or it is damaged."""
        personal = self._read(self._directory / manifest.name)
        if personal is None or personal.record.manifest_sha256 != manifest.sha256():
            return None
        fits = manifest.parameter_count + manifest.local_count
        return personal if personal.weights is None or len(personal.weights) == fits else None

    def records(self) -> tuple[PersonalRecord, ...]:
        """All that there is, by model."""
        found = (self._read(path) for path in self._paths())
        return tuple(personal.record for personal in found if personal is not None)

    def drop(self, model: str | None = None) -> tuple[str, ...]:
        """Deletes what there is for a model, or for all; returns the names of the models.

        Raises:
            StorageError: deleting failed.
        """
        dropped = []
        with storage_errors("deleting a personal model"):
            for path in self._paths():
                if model in (None, path.name):
                    path.unlink(missing_ok=True)
                    dropped.append(path.name)
        return tuple(dropped)

    def _paths(self) -> list[Path]:
        try:
            return sorted(path for path in self._directory.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def _read(self, path: Path) -> Personal | None:
        try:
            line, _, values = path.read_bytes().partition(b"\n")
            head = json.loads(line)
            record = PersonalRecord.model_validate(head["record"])
            whole = hashlib.sha256(values).hexdigest() == head["sha256"] and len(values) % 4 == 0
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        if not whole or bool(values) != record.kept:
            return None
        return Personal(record, np.frombuffer(values, "<f4").astype(np.float32) if values else None)
