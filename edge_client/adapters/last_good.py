"""What a device answers with, as it is on disk: the last good version, or its personal form if there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from edge_client.library import Library, StoredVersion
from edge_client.personalisation import Personal
from edge_client.prediction import NoModel, PredictionFailed
from edge_client.session_state import UNUSABLE
from edge_client.training import ModelRejected, WeightsRejected
from models.manifest import ModelManifest
from models.weights import decode_local, decode_weights, entry_vectors

T = TypeVar("T")
_NONE: Mapping[str, str] = {}


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
        ModelRejected, WeightsRejected: it does not run, and that cannot be written down.
        CredentialError: the device is not set up.
        NoModel: no version of the model is good yet, or none runs any more.
        PredictionFailed: several models could be meant.
        StorageError: the store cannot be read.
    """
    while True:
        failed = {each.sha256: f"{each.fault.code}: {each.fault.detail}" for each in uses.found()}
        serving = last_good(state, model, failed)
        sha256 = serving.manifest.sha256()
        try:
            with uses.of(sha256):
                return run(serving)
        except (ModelRejected, WeightsRejected) as error:
            if not blamed(uses, sha256, error):
                raise


def blamed(uses: VersionUses, sha256: str, error: Exception) -> bool:
    """Leaves word that a version does not run; returns False when that cannot be written."""
    uses.failed(sha256, Fault(UNUSABLE, str(error)[:300]))
    return any(failure.sha256 == sha256 for failure in uses.found())


def last_good(state: Path, model: str | None = None, failed: Mapping[str, str] = _NONE) -> LastGood:
    """Reads what this device answers predictions with; works while `run` runs.

    Args:
        state: the state directory.
        model: which one; None where there is only one.
        failed: digests of versions that failed here, and that `run` does not know of yet -> why.

    Raises:
        CredentialError: the device is not set up.
        NoModel: no version of the model is good yet, or none runs any more.
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


def _read(state: Path, model: str | None, failed: Mapping[str, str]) -> LastGood:
    load_credentials(state)
    if not (state / DATABASE).exists():
        raise NoModel("this device has no model yet: start `covey-edge run`")
    with DeviceStore.open(state, read_only=True) as store:
        known = store.versions()
        good = [v.manifest for v in known if v.status is VersionStatus.GOOD]
        names = sorted({manifest.name for manifest in good})
        if model is None and len(names) > 1:
            raise PredictionFailed("model-unclear", f"this device has several models: {', '.join(names)}")
        # In the order in which they were served: after a roll-back, the highest number is not the last one.
        working = [m for m in good if model in (None, m.name) and m.sha256() not in failed]
        if not working:
            raise _no_model([v for v in known if model in (None, v.manifest.name)], model, failed)
        manifest = working[-1]
        own = Library(own={saved.model: saved for saved in store.local()}).local(manifest)
        return LastGood(
            manifest,
            graph=store.blobs.read(manifest.graph),
            weights=decode_weights(store.blobs.read(manifest.weights), manifest),
            local=decode_local(store.blobs.read_local(own)) if own is not None else None,
            personal=store.blobs.personal.load(manifest),
        )


def _no_model(known: Sequence[StoredVersion], model: str | None, failed: Mapping[str, str]) -> NoModel:
    """Why there is nothing to predict with: it has not come yet, or does not run here."""
    bad = [
        (version.manifest, failed.get(version.manifest.sha256(), version.reason))
        for version in known
        if version.status is VersionStatus.BAD or version.manifest.sha256() in failed
    ]
    if not bad:
        missing = f"no good version of {model}" if model else "no model"
        return NoModel(f"this device has {missing} yet: it comes while `covey-edge run` runs")
    manifest, reason = bad[-1]
    return NoModel(
        f"no version of {manifest.name} runs on this device: version {manifest.version} failed "
        f"({reason}); another one comes by a rollout"
    )
