"""What is kept, and for how long: the rest is deleted by the service, a little at a time.

Never deleted: the privacy ledger, transcripts (the chain by which anybody re-computes it), the audit log,
rounds with their reports, and the signed manifest of every version.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from aggregator.clock import Moment
from aggregator.records import Version
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import blobs_of
from aggregator.repository import Reader, Repository
from aggregator.rollout.machine import OPEN
from aggregator.rounds.planning import VersionToEvaluate, asked_by
from protocol.fields import BlobRef

logger = logging.getLogger(__name__)

DAY = 86_400
EVERY_SECONDS = 3600.0
BATCH = 100
"""Selections, and artefacts, that one pass deletes at most: the rounds wait for it."""


class Retention(BaseModel):
    """What `aggregator.json` says under `keep`; None keeps everything.

    Attributes:
        versions: of each model, so many of the newest keep their weights, and as many of the newest stable
            ones. So does every version that is assigned, pinned, on its way, or asked for by a campaign.
        selection_days: how long it is recorded which devices a cohort was drawn from, and by what they said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[int, Field(ge=2)] | None = 100
    selection_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 90.0


FOREVER = Retention(versions=None, selection_days=None)
DEFAULT_RETENTION = Retention()


class Keeper:
    """Belongs to the main loop."""

    def __init__(self, store: ArtefactStore, retention: Retention) -> None:
        """Prepares it; the first pass is due at once."""
        self._store = store
        self._retention = retention
        self._due = float("-inf")

    def tick(self, repository: Repository, at: Moment) -> None:
        """Deletes what is too old, if a pass is due.

        Raises:
            RepositoryError: nothing was deleted from the database.
            StoreUnavailable: some artefacts may be there yet; a later pass deletes them.
        """
        if at.clock < self._due or self._retention == FOREVER:
            return
        self._due = at.clock + EVERY_SECONDS
        keep = self._retention
        # A write transaction for artefacts, too: whoever publishes the same file just now waits.
        with repository.write() as writer:
            forgotten = 0
            if keep.selection_days is not None:
                forgotten = writer.forget_selections(at.unix - keep.selection_days * DAY, BATCH)
            removed = 0
            if keep.versions is not None:
                old = _superfluous(writer, keep.versions)
                # Most went long ago: the store is asked for what it has, not for each of them.
                held = self._store.held() if old else frozenset()
                for blob in sorted((b for b in old if b.sha256 in held), key=lambda b: b.sha256)[:BATCH]:
                    self._store.remove(blob)
                    removed += 1
        if forgotten or removed:
            logger.info("retention: %d selections and %d artefacts deleted", forgotten, removed)
        if BATCH in (forgotten, removed):
            self._due = at.clock + 1.0


def _superfluous(reader: Reader, count: int) -> set[BlobRef]:
    """Artefacts that only versions have which keep theirs no longer."""
    versions = reader.versions()
    if not any(len([v for v in versions if v.model == model]) > count for model in _models(versions)):
        return set()
    kept = {(v.model, v.version) for model in _models(versions) for v in _newest(versions, model, count)}
    kept |= set(_referred_to(reader, _models(versions)))
    artefacts: dict[bool, set[BlobRef]] = {True: set(), False: set()}
    for version in versions:
        artefacts[(version.model, version.version) in kept] |= set(blobs_of(version))
    return artefacts[False] - artefacts[True]


def _models(versions: tuple[Version, ...]) -> tuple[str, ...]:
    return tuple(sorted({version.model for version in versions}))


def _newest(versions: tuple[Version, ...], model: str, count: int) -> Iterator[Version]:
    of_model = [version for version in versions if version.model == model]
    yield from of_model[-count:]
    yield from [version for version in of_model if version.stage == "stable"][-count:]


def _referred_to(reader: Reader, models: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Versions that devices have or may be told to have, and those that rounds are, or will be, about."""
    for model in models:
        assigned = (reader.assigned(model), *reader.assigned_devices(model))
        yield from ((model, each.version) for each in assigned if each is not None and each.version)
        yield from ((model, pin.version) for pin in reader.pins(model))
    yield from ((rollout.model, rollout.version) for rollout in reader.rollouts(*OPEN))
    for running in reader.rounds(status="running"):
        if running.model is not None and running.base_version is not None:
            yield running.model, running.base_version
    for campaign in reader.campaigns("waiting", "running", "paused"):
        asks = asked_by(campaign)
        if campaign.model is not None and isinstance(asks, VersionToEvaluate):
            yield campaign.model, asks.version
