"""The one storage interface of the aggregator, and what every implementation promises.

Everything happens in a transaction: `read()` sees one consistent state, `write()` is atomic, durable once the
block is left, and serialised against every other writer of the same database, in this process or another.
Leaving a `write()` block by an exception changes nothing. Durable means that a receipt may be sent: what was
written survives SIGKILL and a power cut.

Retries. Nobody retries inside an implementation: only the caller can make the whole transaction again. The
service does so for every `StorageUnavailable`: it loads its state again, and the broker brings again what was
not acknowledged. A command of an operator ends, and says why.

Implementations hold no rules. What they do refuse, because no caller can check it without a race: a second
record under the same key (`Conflict`), and changes to what is not there (`NotFound`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from aggregator.access.tokens import TokenRecord
from aggregator.fleet.enrolment import EnrolmentToken
from aggregator.records import (
    Assigned,
    AuditEntry,
    Campaign,
    CampaignStatus,
    Device,
    DeviceFilter,
    DeviceState,
    Evaluation,
    FleetSize,
    IssuedCertificate,
    LedgerEntry,
    LogEntry,
    NoiseTree,
    OptimizerMemory,
    Pin,
    Rollout,
    Round,
    RoundEnding,
    RoundStatus,
    Stage,
    Upload,
    Version,
)
from protocol.fields import BlobRef
from protocol.messages import DeviceStatus


class RepositoryError(Exception):
    """Something is wrong with the storage, or with what was asked of it."""


class UnknownSchema(RepositoryError):
    """The database was made by a newer Covey, or by something else; nothing was changed."""


class OutdatedSchema(RepositoryError):
    """The database was made by an older Covey, or has no tables yet: it must be migrated first."""


class StorageUnavailable(RepositoryError):
    """The database cannot be read or written now: disk full, read-only, locked, gone. Nothing was changed."""


class Contended(StorageUnavailable):
    """Somebody else was in the way for too long; the same transaction may succeed when it is made again."""


class OutcomeUnknown(StorageUnavailable):
    """The database was lost while it committed: only another look at it can tell whether it has."""


class Superseded(RepositoryError):
    """Another service has claimed the database: this one must end."""


class Unstorable(ValueError):
    """A value that this database cannot hold, such as a zero byte in a text; nothing was changed."""


class Conflict(RepositoryError):
    """A record with this key is already there."""


class NotFound(RepositoryError):
    """There is no such record."""


class Reader(Protocol):
    """One consistent view of the database."""

    # --- fleet
    def device(self, device_id: str) -> Device | None:
        """One enrolled device."""
        ...

    def device_state(self, device_id: str) -> DeviceState | None:
        """Whether a device may be in the fleet; None of one that is not enrolled. Asked for every message."""
        ...

    def devices(self) -> tuple[Device, ...]:
        """Every enrolled device, by id."""
        ...

    def devices_page(self, which: DeviceFilter, *, after: str, limit: int) -> tuple[Device, ...]:
        """At most `limit` devices that fit, by id, from the first id above `after` on."""
        ...

    def active_devices(self) -> frozenset[str]:
        """Ids of the devices that may connect: neither revoked nor retired."""
        ...

    def fleet_size(self) -> FleetSize:
        """How many devices there are that are neither revoked nor retired."""
        ...

    def count_devices(self, which: DeviceFilter) -> int:
        """How many enrolled devices fit."""
        ...

    def certificates(
        self, device_id: str | None = None, *, revoked: bool | None = None
    ) -> tuple[IssuedCertificate, ...]:
        """Certificates that were issued, of one device or of all, oldest first.

        Args:
            device_id: only those of this device.
            revoked: only those that are, or only those that are not.
        """
        ...

    def enrolment_token(self, token_id: str) -> EnrolmentToken | None:
        """One enrolment token, used or not."""
        ...

    def enrolment_tokens(self) -> tuple[EnrolmentToken, ...]:
        """Every enrolment token ever made, oldest first."""
        ...

    # --- versions
    def version(self, model: str, version: int) -> Version | None:
        """One version of a model."""
        ...

    def newest_version(self, model: str, *stages: Stage) -> Version | None:
        """The version with the highest number, in one of the stages (any when none is named)."""
        ...

    def newest_versions(self) -> tuple[Version, ...]:
        """The newest version of every model, by model."""
        ...

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        """All versions, of one model or of all, by model and number."""
        ...

    # --- who has which version
    def pins(self, model: str | None = None) -> tuple[Pin, ...]:
        """The pins of a model, or all; by model, kind and target."""
        ...

    def assigned(self, model: str, device_id: str = "") -> Assigned | None:
        """What the fleet, or one device, was last told to have."""
        ...

    def assigned_devices(self, model: str, *, of_its_own: bool = False) -> tuple[Assigned, ...]:
        """The devices that were ever told to have a version of their own, by id.

        Args:
            of_its_own: only those that still are to have one.
        """
        ...

    def rollout(self, rollout_id: str) -> Rollout | None:
        """One rollout."""
        ...

    def rollouts(self, *statuses: str) -> tuple[Rollout, ...]:
        """Rollouts in one of the statuses (all when none is named), oldest first."""
        ...

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

    # --- access
    def token(self, token_id: str) -> TokenRecord | None:
        """One token, revoked or not."""
        ...

    def tokens(self) -> tuple[TokenRecord, ...]:
        """Every token ever made, oldest first."""
        ...

    def audit(self, *, before: int | None = None, limit: int = 100) -> tuple[AuditEntry, ...]:
        """At most `limit` entries of the audit log, newest first, from below the number `before` on."""
        ...


class Writer(Reader, Protocol):
    """A transaction that may change things; it sees its own changes."""

    # --- fleet
    def add_device(self, device: Device) -> None:
        """Enrols a device.

        Raises:
            Conflict: a device with this id is enrolled.
        """
        ...

    def replace_certificate(self, device_id: str, certificate: bytes) -> None:
        """Records a new certificate of an enrolled device.

        Raises:
            NotFound: no such device.
        """
        ...

    def note_enrolment(self, device_id: str, token_id: str | None, at: float) -> None:
        """Records that a known device was enrolled anew, and by which token: it is active from now on.

        Raises:
            NotFound: no such device.
        """
        ...

    def set_device_state(self, device_id: str, state: DeviceState) -> None:
        """Says whether a device may be in the fleet.

        Raises:
            NotFound: no such device.
        """
        ...

    def add_certificate(self, certificate: IssuedCertificate) -> None:
        """Records a certificate that was issued to an enrolled device.

        Raises:
            Conflict: the serial number is taken, or there is no such device.
        """
        ...

    def revoke_certificate(self, serial: str, at: float, reason: str) -> None:
        """Revokes a certificate; one that is revoked keeps its first moment and reason.

        Raises:
            NotFound: no such certificate.
        """
        ...

    def add_enrolment_token(self, token: EnrolmentToken) -> None:
        """Adds an enrolment token.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def use_enrolment_token(self, token_id: str, key_id: str, at: float) -> None:
        """Records that a key was enrolled by a token.

        Raises:
            NotFound: no such token that is not used yet.
        """
        ...

    def revoke_enrolment_token(self, token_id: str, at: float) -> None:
        """Revokes an enrolment token; one that is revoked keeps its first moment.

        Raises:
            NotFound: no such token.
        """
        ...

    def set_exclusion(self, device_id: str, reason: str | None) -> None:
        """Excludes a device from selection, or takes it back in with None.

        Raises:
            NotFound: no such device.
        """
        ...

    def set_labels(self, device_id: str, labels: tuple[str, ...]) -> None:
        """Replaces the labels of a device.

        Raises:
            NotFound: no such device.
        """
        ...

    def note_status(self, device_id: str, status: DeviceStatus, at: float) -> None:
        """Records a birth or a will; a device that is not enrolled is ignored."""
        ...

    # --- versions
    def add_version(self, version: Version) -> None:
        """Adds a published version.

        Raises:
            Conflict: the model has this version, or this round has published one.
        """
        ...

    # --- who has which version
    def set_stage(self, model: str, version: int, stage: Stage) -> None:
        """Notes how far a version has come.

        Raises:
            NotFound: no such version.
        """
        ...

    def set_pin(self, pin: Pin) -> None:
        """Adds a pin, in place of one of the same target."""
        ...

    def drop_pin(self, model: str, kind: str, target: str) -> None:
        """Removes a pin.

        Raises:
            NotFound: there is none.
        """
        ...

    def assign(self, assigned: Assigned) -> None:
        """Records what the fleet, or one device, is told to have.

        Raises:
            Conflict: its sequence is not above the one before.
        """
        ...

    def add_rollout(self, rollout: Rollout) -> None:
        """Adds a rollout.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def update_rollout(self, rollout_id: str, status: str, progress: bytes) -> None:
        """Changes status and progress of a rollout.

        Raises:
            NotFound: no such rollout.
        """
        ...

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

    # --- access
    def add_token(self, token: TokenRecord) -> None:
        """Adds a token.

        Raises:
            Conflict: the id is taken.
        """
        ...

    def revoke_token(self, token_id: str, at: float) -> None:
        """Revokes a token; one that is revoked keeps its first moment.

        Raises:
            NotFound: no such token.
        """
        ...

    def append_audit(self, entry: AuditEntry) -> None:
        """Appends an entry to the audit log, which nothing can change or erase; its number is ignored."""
        ...


class Repository(Protocol):
    """The database."""

    def read(self) -> AbstractContextManager[Reader]:
        """Opens a consistent view; it never waits for a writer."""
        ...

    def write(self) -> AbstractContextManager[Writer]:
        """Opens the one write transaction; waits for another writer, but not for ever.

        Raises:
            Contended: another writer, or somebody else at the database, took too long; nothing was changed.
            OutcomeUnknown: on leaving, the connection was lost.
            StorageUnavailable: on entry, inside or on leaving; nothing was changed.
            Superseded: this repository was claimed, and then by another service.
        """
        ...

    def close(self) -> None:
        """Releases connections and files."""
        ...
