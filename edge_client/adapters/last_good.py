"""What a device answers with, as it is on disk: the last good version, or its personal form if there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.files import StorageError
from edge_client.adapters.store import DATABASE, DeviceStore
from edge_client.adapters.uses import VersionUses
from edge_client.durable import VersionStatus
from edge_client.events import Fault
from edge_client.library import Library
from edge_client.personalisation import Personal
from edge_client.prediction import NoModel, PredictionFailed
from edge_client.session_state import UNUSABLE
from edge_client.training import ModelRejected, WeightsRejected
from models.manifest import ModelManifest
from models.weights import decode_local, decode_weights, entry_vectors

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LastGood:
    """All that a prediction needs: the last good version, and what this device has of its own for it."""

    manifest: ModelManifest
    graph: bytes
    weights: NDArray[np.float32]
    local: NDArray[np.float32] | None
    personal: Personal | None

    def used(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Shared and local parameters that this device answers with."""
        if self.personal is None or self.personal.weights is None:
            return self.weights, self.local
        vectors = entry_vectors(self.manifest, self.personal.weights)
        return vectors["weights"], vectors.get("local")


def with_version(state: Path, model: str | None, uses: VersionUses, run: Callable[[LastGood], T]) -> T:
    """Does something with the version served; with the one before, when that one does not run.

    `run` of the client is told, and serves that one from then on.

    Args:
        state: the state directory.
        model: which one; None where there is only one.
        uses: the notes of this process.
        run: raises ModelRejected or WeightsRejected when the version does not run.

    Raises:
        ModelRejected, WeightsRejected: none runs.
        CredentialError: the device is not set up.
        NoModel: no version of the model is good yet.
        PredictionFailed: several models could be meant.
        StorageError: the store cannot be read.
    """
    while True:
        failed = frozenset(failure.sha256 for failure in uses.found())
        serving = last_good(state, model, failed)
        sha256 = serving.manifest.sha256()
        try:
            with uses.of(sha256):
                return run(serving)
        except (ModelRejected, WeightsRejected) as error:
            if sha256 in failed or not blamed(uses, sha256, error):
                raise


def blamed(uses: VersionUses, sha256: str, error: Exception) -> bool:
    """Leaves word that a version does not run; returns False when that cannot be written."""
    uses.failed(sha256, Fault(UNUSABLE, str(error)[:300]))
    return any(failure.sha256 == sha256 for failure in uses.found())


def last_good(state: Path, model: str | None = None, failed: frozenset[str] = frozenset()) -> LastGood:
    """Reads what this device answers predictions with; works while `run` runs.

    Args:
        state: the state directory.
        model: which one; None where there is only one.
        failed: digests of versions that failed here: the one before is read, unless all did.

    Raises:
        CredentialError: the device is not set up.
        NoModel: no version of the model is good yet.
        PredictionFailed: several models could be meant.
        StorageError: the store cannot be read.
    """
    for attempt in (1, 2):
        try:
            return _read(state, model, failed)
        except StorageError:
            # `run` may have switched versions and deleted the old one's files in between.
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _read(state: Path, model: str | None, failed: frozenset[str]) -> LastGood:
    load_credentials(state)
    if not (state / DATABASE).exists():
        raise NoModel("this device has no model yet: start `covey-edge run`")
    with DeviceStore.open(state, read_only=True) as store:
        good = [v.manifest for v in store.versions() if v.status is VersionStatus.GOOD]
        names = sorted({manifest.name for manifest in good})
        if model is None and len(names) > 1:
            raise PredictionFailed("model-unclear", f"this device has several models: {', '.join(names)}")
        chosen = [manifest for manifest in good if model in (None, manifest.name)]
        if not chosen:
            missing = f"no good version of {model}" if model else "no model"
            raise NoModel(f"this device has {missing} yet: it comes while `covey-edge run` runs")
        # In the order in which they were served: after a roll-back, the highest number is not the last one.
        working = [manifest for manifest in chosen if manifest.sha256() not in failed]
        manifest = (working or chosen)[-1]
        own = Library(own={saved.model: saved for saved in store.local()}).local(manifest)
        return LastGood(
            manifest,
            graph=store.blobs.read(manifest.graph),
            weights=decode_weights(store.blobs.read(manifest.weights), manifest),
            local=decode_local(store.blobs.read_local(own)) if own is not None else None,
            personal=store.blobs.personal.load(manifest),
        )
