"""What an operator does: enrol devices, publish models, ask for rounds, and look at what became of them.

Every operation is one transaction on the repository; the service, in another process, sees its effect at its
next poll.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.access.roles import Role
from aggregator.access.tokens import ID_BYTES, SECRET_BYTES, TokenRecord, make_token
from aggregator.clock import Clock
from aggregator.enrolment_operations import EnrolmentOperations
from aggregator.evaluations import EvaluationRequest
from aggregator.fleet.authority import Authority
from aggregator.fleet.enrolment import Doorway
from aggregator.lifecycle_operations import LifecycleOperations
from aggregator.queries import QueryRequest
from aggregator.records import (
    AuditEntry,
    Campaign,
    CampaignStatus,
    Device,
    DeviceFilter,
    Round,
    RoundStatus,
    Version,
)
from aggregator.refusals import NoSuch as NoSuch
from aggregator.refusals import OperationRefused as OperationRefused
from aggregator.refusals import there as _there
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import manifest_of, publish
from aggregator.repository import NotFound, Repository, Writer
from aggregator.rollout_operations import RolloutOperations
from aggregator.rounds.evaluation import VersionEvaluation
from aggregator.rounds.noise_tree import devices_needed
from aggregator.rounds.planning import CampaignSettings, check_settings
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selection import Selection
from aggregator.settings import CampaignRequest, InvalidSettings
from models.manifest import ModelManifest
from protocol.codec import decode_from_device
from protocol.dp.errors import PrivacyError
from protocol.messages import DeviceStatus


@dataclass(frozen=True)
class Model:
    """A published version with its files."""

    manifest: ModelManifest
    graph: bytes
    weights: bytes


@dataclass(frozen=True)
class RoundView:
    """A round, and its figures so far."""

    record: Round
    report: RoundReport


@dataclass(frozen=True)
class LiveRound:
    """The inside of a round that is running.

    Attributes:
        number: within its campaign, from 1.
        phase: name of its phase.
        said: device -> types of the messages that the aggregator has of it.
        stored: devices whose masked input is in the sum.
    """

    round_id: str
    number: int
    phase: str
    said: dict[str, frozenset[str]]
    stored: frozenset[str]


@dataclass(frozen=True)
class Operator(EnrolmentOperations, LifecycleOperations, RolloutOperations):
    """The operations, on one aggregator's state."""

    repository: Repository
    store: ArtefactStore
    authority: Authority
    clock: Clock
    publishers: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    doorway: Doorway = field(default_factory=Doorway)

    # --- devices

    def devices(self) -> tuple[Device, ...]:
        """Every enrolled device."""
        with self.repository.read() as reader:
            return reader.devices()

    def devices_page(self, which: DeviceFilter, *, after: str, limit: int) -> tuple[Device, ...]:
        """At most `limit` devices that fit, by id, from the first id above `after` on."""
        with self.repository.read() as reader:
            return reader.devices_page(which, after=after, limit=limit)

    def count_devices(self, which: DeviceFilter) -> int:
        """How many devices fit."""
        with self.repository.read() as reader:
            return reader.count_devices(which)

    def device(self, device_id: str) -> Device:
        """One device.

        Raises:
            NoSuch: it is not enrolled.
        """
        with self.repository.read() as reader:
            return _there(reader.device(device_id), f"no device {device_id}: see `covey device list`")

    def label(self, device_id: str, labels: Iterable[str]) -> Device:
        """Replaces the labels of a device.

        Raises:
            NoSuch: it is not enrolled.
        """
        with self.repository.write() as writer:
            device = _there(writer.device(device_id), f"no device {device_id}: see `covey device list`")
            sorted_labels = tuple(sorted(set(labels)))
            writer.set_labels(device_id, sorted_labels)
        return replace(device, labels=sorted_labels)

    def exclude(self, device_id: str, reason: str | None) -> None:
        """Keeps a device out of future rounds, or lets it in again with None.

        Raises:
            NoSuch: it is not enrolled.
        """
        try:
            with self.repository.write() as writer:
                writer.set_exclusion(device_id, reason)
        except NotFound as error:
            raise NoSuch(f"{error}: see `covey device list`") from error

    # --- models

    def publish(
        self, manifest: bytes, graph: bytes, weights: bytes, signature: bytes | None = None
    ) -> Version:
        """Publishes a model as its next version; the service announces it.

        Args:
            manifest: as the exporter wrote it.
            graph: the model's graph.
            weights: its weights file.
            signature: JSON of the SignedDocument around the manifest; needed where publishers are named.

        Raises:
            PublishRefused: it says what to do.
        """
        with self.repository.write() as writer:
            return publish(
                writer,
                self.store,
                self.authority,
                manifest=manifest,
                graph=graph,
                weights=weights,
                now=self.clock.moment().unix,
                signature=signature,
                publishers=self.publishers,
            )

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        """Published versions."""
        with self.repository.read() as reader:
            return reader.versions(model)

    def version(self, name: str, version: int) -> Version:
        """One version.

        Raises:
            NoSuch: it was never published.
        """
        with self.repository.read() as reader:
            found = reader.version(name, version)
        return _there(found, f"no published {name} version {version}: see `covey model list`")

    def model(self, name: str, version: int | None = None) -> Model:
        """The files of a version; of the newest one by default.

        Raises:
            NoSuch: no such version.
        """
        with self.repository.read() as reader:
            found = reader.newest_version(name) if version is None else reader.version(name, version)
        if found is None:
            what = f"{name} version {version}" if version else name
            raise NoSuch(f"there is no published {what}: see `covey model list`")
        manifest = manifest_of(found)
        return Model(manifest, self.store.read(manifest.graph), self.store.read(manifest.weights))

    # --- rounds

    def start_rounds(self, request: CampaignRequest) -> Campaign:
        """Asks for rounds; the service runs them one after the other.

        Raises:
            OperationRefused: the model has no version, or no round could follow the settings.
        """
        try:
            rounds, settings = request.resolve()
        except InvalidSettings as error:
            raise OperationRefused(str(error)) from error
        with self.repository.write() as writer:
            version = writer.newest_version(request.model)
            if version is None:
                raise OperationRefused(
                    f"there is no published {request.model}: publish it with `covey model publish DIR`"
                )
            return self._add_campaign(writer, settings, rounds, manifest_of(version))

    def start_query(self, request: QueryRequest) -> Campaign:
        """Asks a query: a campaign of one round, whose report will have the answer.

        Raises:
            OperationRefused: no round could ask it.
        """
        try:
            settings = request.resolve()
        except (InvalidSettings, PrivacyError) as error:
            raise OperationRefused(str(error)) from error
        with self.repository.write() as writer:
            return self._add_campaign(writer, settings, 1, None)

    # --- evaluations

    def start_evaluation(self, request: EvaluationRequest) -> Campaign:
        """Asks devices how a version does on their examples: a campaign of one round.

        Raises:
            OperationRefused: no such version, or no round could follow the settings.
        """
        with self.repository.write() as writer:
            version = (
                writer.newest_version(request.model)
                if request.version is None
                else writer.version(request.model, request.version)
            )
            if version is None:
                what = request.model if request.version is None else f"{request.model} v{request.version}"
                raise OperationRefused(f"there is no published {what}: see `covey model list`")
            try:
                settings = request.resolve(version.version)
            except InvalidSettings as error:
                raise OperationRefused(str(error)) from error
            return self._add_campaign(writer, settings, 1, manifest_of(version))

    def evaluations(self, model: str, version: int | None = None) -> tuple[VersionEvaluation, ...]:
        """How a model's versions did on the devices, oldest first; with `version`, only that one."""
        with self.repository.read() as reader:
            found = reader.evaluations(model, version)
        return tuple(VersionEvaluation.from_bytes(each.figures) for each in found)

    def evaluation(self, model: str, version: int) -> VersionEvaluation | None:
        """The latest evaluation of a version; None when there is none."""
        found = self.evaluations(model, version)
        return found[-1] if found else None

    def _add_campaign(
        self, writer: Writer, settings: CampaignSettings, rounds: int, base: ModelManifest | None
    ) -> Campaign:
        try:
            check_settings(settings, base)
        except ValueError as error:
            raise OperationRefused(str(error)) from error
        enrolled = sum(device.excluded is None and device.state == "active" for device in writer.devices())
        if (needed := devices_needed(settings)) > enrolled:
            raise OperationRefused(
                f"no device is in two rounds of a noise tree: until it restarts, {needed} devices are needed "
                f"and {enrolled} enrolled: use a smaller --restart-every or --cohort"
            )
        campaign = Campaign(
            campaign_id=secrets.token_hex(16),
            model=None if base is None else base.name,
            rounds=rounds,
            settings=settings.to_bytes(),
            created_at=self.clock.moment().unix,
            due_at=_due(settings, self.clock.moment().unix),
        )
        writer.add_campaign(campaign)
        return campaign

    def campaign(self, campaign_id: str) -> Campaign:
        """One campaign as it is now.

        Raises:
            NoSuch: no such campaign.
        """
        with self.repository.read() as reader:
            campaign = reader.campaign(campaign_id)
        return _there(campaign, f"no campaign {campaign_id}: see `covey campaign list`")

    def campaigns(self, *, active: bool = False) -> tuple[Campaign, ...]:
        """Campaigns, oldest first; with `active`, only those that have rounds to run."""
        with self.repository.read() as reader:
            return reader.campaigns("waiting", "running", "paused") if active else reader.campaigns()

    def pause_campaign(self, campaign_id: str) -> Campaign:
        """Lets a campaign begin no more rounds until it is resumed; a round that runs goes to its end.

        Raises:
            OperationRefused: no such campaign, or it has ended or is paused.
        """
        return self._move(campaign_id, ("waiting", "running"), "paused")

    def resume_campaign(self, campaign_id: str) -> Campaign:
        """Lets a paused campaign go on; with a schedule, from its next firing.

        Raises:
            OperationRefused: no such campaign, or it is not paused.
        """
        return self._move(campaign_id, ("paused",), "running")

    def cancel_campaign(self, campaign_id: str) -> Campaign:
        """Ends a campaign: a round of it that runs is aborted, unless its devices were asked to unmask.

        Raises:
            OperationRefused: no such campaign, or it has ended.
        """
        return self._move(campaign_id, ("waiting", "running", "paused"), "cancelled")

    def _move(
        self, campaign_id: str, allowed: tuple[CampaignStatus, ...], status: CampaignStatus
    ) -> Campaign:
        with self.repository.write() as writer:
            campaign = _there(
                writer.campaign(campaign_id), f"no campaign {campaign_id}: see `covey campaign list`"
            )
            if campaign.status not in allowed:
                raise OperationRefused(
                    f"campaign {campaign_id[:8]} is {campaign.status}: only one that is "
                    f"{' or '.join(allowed)} can become {status}"
                )
            if status == "running":
                if not campaign.started:
                    status = "waiting"
                # A firing that the pause swallowed is not made up for: it would start at an hour that nobody
                # asked for.
                settings = CampaignSettings.from_bytes(campaign.settings)
                writer.set_due(campaign_id, _due(settings, self.clock.moment().unix))
            if status == "cancelled":
                writer.fell_noise_tree(campaign_id)
                writer.forget_optimizer_memory(campaign_id)
            writer.update_campaign(campaign_id, status)
            return _there(writer.campaign(campaign_id), f"no campaign {campaign_id}")

    def rounds(
        self,
        campaign_id: str | None = None,
        *,
        status: RoundStatus | None = None,
        last: int | None = None,
        before: str | None = None,
    ) -> tuple[RoundView, ...]:
        """Rounds with their figures, oldest first; with `before`, those that began before that round."""
        with self.repository.read() as reader:
            records = reader.rounds(campaign_id=campaign_id, status=status, last=last, before=before)
        return tuple(RoundView(record, RoundReport.from_bytes(record.report)) for record in records)

    def round(self, round_id: str) -> RoundView:
        """One round.

        Raises:
            NoSuch: there was none.
        """
        with self.repository.read() as reader:
            record = _there(reader.round(round_id), f"no round {round_id}: see `covey round status`")
        return RoundView(record, RoundReport.from_bytes(record.report))

    def selection(self, round_id: str) -> Selection:
        """How the cohort of a round was drawn; `chosen` draws it again.

        Raises:
            NoSuch: there was no such round, or it was drawn before this was recorded.
        """
        with self.repository.read() as reader:
            record = reader.selection(round_id)
        return Selection.from_bytes(_there(record, f"no record of how round {round_id} was drawn"))

    def live_rounds(self) -> tuple[LiveRound, ...]:
        """What the running rounds have heard so far; for those who stage accidents, and for curious ones."""
        with self.repository.read() as reader:
            records = reader.rounds(status="running")
            logs = [reader.log(record.round_id) for record in records]
        live = []
        for record, log in zip(records, logs, strict=True):
            said: dict[str, frozenset[str]] = {}
            for entry in log:
                if entry.kind == "received":
                    message, _ = decode_from_device(entry.frame)
                    said[entry.device_id] = said.get(entry.device_id, frozenset()) | {message.type}
            phases = RoundReport.from_bytes(record.report).phases
            live.append(
                LiveRound(
                    round_id=record.round_id,
                    number=record.number,
                    phase=phases[-1].phase if phases else "AdvertiseKeys",
                    said=said,
                    stored=frozenset(entry.device_id for entry in log if entry.kind == "stored"),
                )
            )
        return tuple(live)

    # --- access

    def create_token(
        self, *, role: Role, label: str, seconds: float, created_by: str
    ) -> tuple[str, TokenRecord]:
        """Makes a token; returns (the token, which is not kept; its record)."""
        token, record = make_token(
            secrets.token_bytes(ID_BYTES + SECRET_BYTES),
            role=role,
            label=label,
            now=self.clock.moment().unix,
            seconds=seconds,
            created_by=created_by,
        )
        with self.repository.write() as writer:
            writer.add_token(record)
        return token, record

    def tokens(self) -> tuple[TokenRecord, ...]:
        """Every token ever made, oldest first, without what opens it."""
        with self.repository.read() as reader:
            return reader.tokens()

    def revoke_token(self, token_id: str) -> None:
        """Revokes a token, from the next request on.

        Raises:
            NoSuch: there is none.
        """
        try:
            with self.repository.write() as writer:
                writer.revoke_token(token_id, self.clock.moment().unix)
        except NotFound as error:
            raise NoSuch(f"{error}: see `covey token list`") from error

    def audit_log(self, *, before: int | None = None, limit: int = 100) -> tuple[AuditEntry, ...]:
        """Entries of the audit log, newest first."""
        with self.repository.read() as reader:
            return reader.audit(before=before, limit=limit)

    def note_all_offline(self) -> None:
        """Marks every device offline: nobody is known to be there before the service hears of it."""
        now = self.clock.moment().unix
        with self.repository.write() as writer:
            for device in writer.devices():
                if device.online:
                    gone = DeviceStatus(session=bytes(32), online=False, models={})
                    writer.note_status(device.device_id, gone, device.last_seen or now)


def _due(settings: CampaignSettings, now: float) -> float | None:
    return None if settings.schedule is None else settings.schedule.after(now)
