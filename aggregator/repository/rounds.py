"""The part of the repository that holds campaigns, rounds, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from aggregator.records import (
    Campaign,
    CampaignStatus,
    Evaluation,
    LedgerEntry,
    LogEntry,
    NoiseTree,
    OptimizerMemory,
    Round,
    RoundEnding,
    RoundStatus,
    Upload,
)
from protocol.fields import BlobRef


class RoundReader(Protocol):
    """What can be read of it; see `aggregator.repository`."""

    # --- campaigns and rounds
    def campaign(self, campaign_id: str) -> Campaign | None:
        """One campaign."""
        ...

    def campaigns(self, *statuses: CampaignStatus) -> tuple[Campaign, ...]:
        """Campaigns in one of the statuses (all when none is named), oldest first."""
        ...

    def round(self, round_id: str) -> Round | None:
        """One round."""
        ...

    def rounds(
        self,
        *,
        campaign_id: str | None = None,
        status: RoundStatus | None = None,
        last: int | None = None,
        before: str | None = None,
    ) -> tuple[Round, ...]:
        """Rounds, oldest first; with `last`, only that many of the newest.

        Args:
            before: id of a round: only those that began before it.
        """
        ...

    def selection(self, round_id: str) -> bytes | None:
        """How the cohort of a round was drawn; None of rounds from before that was recorded."""
        ...

    def contributors(self, model: str) -> frozenset[str]:
        """The devices whose contribution is in any version of a model."""
        ...

    def noise_tree(self, campaign_id: str) -> NoiseTree | None:
        """The tree that a campaign's central noise is of at present."""
        ...

    def optimizer_memory(self, campaign_id: str) -> OptimizerMemory | None:
        """What a campaign's server optimizer remembers of its rounds."""
        ...

    # --- the round that is running
    def log(self, round_id: str) -> tuple[LogEntry, ...]:
        """The events of a running round in the order of `append_log`; empty once the round has ended."""
        ...

    def inputs(self, round_id: str) -> dict[str, str]:
        """Device id -> SHA-256 of its masked input, for each that is in the sum of a running round."""
        ...

    def uploads(self, round_id: str) -> tuple[Upload, ...]:
        """Uploads under way."""
        ...

    def chunks(self, round_id: str, device_id: str) -> Iterator[bytes]:
        """The stored chunks of an upload, by index, one in memory at a time."""
        ...

    def sum_slice(self, round_id: str, start: int) -> bytes | None:
        """The slice of the partial sum that begins at element `start`; None when nothing was added yet."""
        ...

    # --- what stays
    def ledger(self, model: str | None = None) -> tuple[LedgerEntry, ...]:
        """What rounds cost in privacy, oldest first."""
        ...

    def evaluations(self, model: str, version: int | None = None) -> tuple[Evaluation, ...]:
        """How versions of a model did, oldest first; with `version`, only that one."""
        ...

    def transcript(self, round_id: str) -> tuple[bytes, ...]:
        """The transcript records of a round that has ended."""
        ...

    def transcript_head(self) -> bytes | None:
        """The newest transcript record of all rounds."""
        ...


class RoundWriter(Protocol):
    """What can be changed; see `aggregator.repository`."""

    # --- campaigns and rounds
    def add_campaign(self, campaign: Campaign) -> None:
        """Adds a request for rounds.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def update_campaign(self, campaign_id: str, status: CampaignStatus, note: str = "") -> None:
        """Changes status and note of a campaign.

        Raises:
            NotFound: no such campaign.
        """
        ...

    def set_due(self, campaign_id: str, at: float | None) -> None:
        """Says when the next round of a campaign is due, in seconds since 1970.

        Raises:
            NotFound: no such campaign.
        """
        ...

    def begin_round(self, round_: Round) -> None:
        """Adds a running round and counts it in its campaign, whose status becomes `running`.

        Raises:
            Conflict: the round id was used before, by any campaign.
            NotFound: no such campaign.
        """
        ...

    def note_selection(self, round_id: str, record: bytes) -> None:
        """Keeps how the cohort of a round was drawn (`aggregator.rounds.selection.Selection`).

        Raises:
            Conflict: it is kept already.
        """
        ...

    def forget_selections(self, before: float, limit: int) -> int:
        """Deletes how cohorts of rounds that ended before were drawn, at most `limit`; returns how many."""
        ...

    def plant_noise_tree(self, tree: NoiseTree) -> None:
        """Keeps a campaign's new tree, and erases the key of the one before."""
        ...

    def note_leaf_released(self, campaign_id: str, leaf: int) -> None:
        """Records which leaf's sum was released last.

        Raises:
            NotFound: the campaign has no tree that this leaf could follow in.
        """
        ...

    def fell_noise_tree(self, campaign_id: str) -> None:
        """Erases the key of a campaign's tree; nothing happens when there is none."""
        ...

    def keep_optimizer_memory(self, memory: OptimizerMemory) -> None:
        """Replaces what a campaign's server optimizer remembers."""
        ...

    def forget_optimizer_memory(self, campaign_id: str) -> None:
        """Erases it; nothing happens when there is none."""
        ...

    def append_log(self, round_id: str, entry: LogEntry) -> None:
        """Appends one event to the log of a running round.

        Raises:
            NotFound: no such round is running.
        """
        ...

    def save_report(self, round_id: str, report: bytes) -> None:
        """Replaces the report of a round.

        Raises:
            NotFound: no such round.
        """
        ...

    def end_round(self, ending: RoundEnding) -> None:
        """Ends a running round: its status, version, evaluation, ledger entry and transcript become
        true at once.

        The round's log, uploads, chunks, partial sum and list of inputs are erased.

        Raises:
            NotFound: no such round is running, as when it has ended before; nothing changed.
            Conflict: the version is there already; nothing changed.
        """
        ...

    # --- masked inputs
    def open_upload(self, round_id: str, device_id: str, blob: BlobRef) -> None:
        """Notes that a device uploads `blob`; an upload of another blob of that device is forgotten.

        Raises:
            NotFound: no such round is running.
        """
        ...

    def store_chunk(self, round_id: str, device_id: str, index: int, data: bytes) -> None:
        """Stores one chunk of the open upload; a repeated one changes nothing.

        Raises:
            NotFound: the device has no upload open in this round.
        """
        ...

    def drop_upload(self, round_id: str, device_id: str) -> None:
        """Forgets an upload and its chunks; nothing happens when there is none."""
        ...

    def drop_uploads(self, round_id: str) -> None:
        """Forgets every upload of a round that is under way, and its chunks."""
        ...

    def put_sum_slice(self, round_id: str, start: int, data: bytes) -> None:
        """Replaces the slice of the partial sum that begins at element `start`."""
        ...

    def note_input(self, round_id: str, device_id: str, sha256: str) -> None:
        """Enters a masked input that was added to the partial sum into the exactly-once ledger.

        Raises:
            Conflict: an input of this device is in the sum; the caller leaves the transaction by this
                exception, so that nothing is added twice.
        """
        ...
