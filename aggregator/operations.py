"""What an operator does: enrol devices, publish models, ask for rounds, and look at what became of them.

Every operation is one transaction on the repository; the service, in another process, sees its effect at its
next poll.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from aggregator.clock import Clock
from aggregator.fleet.authority import Authority, requested_name
from aggregator.records import Campaign, Device, Round, RoundStatus, Version
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import manifest_of, publish
from aggregator.repository import NotFound, Repository
from aggregator.rounds.planning import check_settings
from aggregator.rounds.report import RoundReport
from aggregator.settings import CampaignRequest, InvalidSettings
from models.manifest import ModelManifest
from protocol.codec import decode_from_device
from protocol.enrolment import EnrolmentBundle
from protocol.messages import DeviceStatus


class OperationRefused(Exception):
    """What was asked for cannot be done; the message says what to do."""


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
class Operator:
    """The operations, on one aggregator's state."""

    repository: Repository
    store: ArtefactStore
    authority: Authority
    clock: Clock

    # --- devices

    def enrol(self, request: bytes, *, name: str | None = None) -> EnrolmentBundle:
        """Enrols a device by its signing request; the same device may renew its certificate this way.

        Args:
            request: PKCS#10, DER.
            name: the id that it gets; by default the one that it asks for.

        Raises:
            EnrolmentRefused: it says what to do.
        """
        asked = name or requested_name(request)
        with self.repository.write() as writer:
            known = writer.device(asked)
            device = self.authority.enrol(
                request, known, name=name, now=self.clock.moment().unix, serial=secrets.randbits(120) | 1
            )
            if known is None:
                writer.add_device(device)
            else:
                writer.replace_certificate(device.device_id, device.certificate)
        return self.authority.bundle(device)

    def devices(self) -> tuple[Device, ...]:
        """Every enrolled device."""
        with self.repository.read() as reader:
            return reader.devices()

    def exclude(self, device_id: str, reason: str | None) -> None:
        """Keeps a device out of future rounds, or lets it in again with None.

        Raises:
            OperationRefused: no such device.
        """
        try:
            with self.repository.write() as writer:
                writer.set_exclusion(device_id, reason)
        except NotFound as error:
            raise OperationRefused(f"{error}: see `covey device list`") from error

    # --- models

    def publish(self, manifest: bytes, graph: bytes, weights: bytes) -> Version:
        """Publishes a model as its next version; the service announces it.

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
            )

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        """Published versions."""
        with self.repository.read() as reader:
            return reader.versions(model)

    def model(self, name: str, version: int | None = None) -> Model:
        """The files of a version; of the newest one by default.

        Raises:
            OperationRefused: no such version.
        """
        with self.repository.read() as reader:
            found = reader.newest_version(name) if version is None else reader.version(name, version)
        if found is None:
            what = f"{name} version {version}" if version else name
            raise OperationRefused(f"there is no published {what}: see `covey model list`")
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
            try:
                check_settings(settings, manifest_of(version))
            except ValueError as error:
                raise OperationRefused(str(error)) from error
            campaign = Campaign(
                campaign_id=secrets.token_hex(16),
                model=request.model,
                rounds=rounds,
                settings=settings.to_bytes(),
                created_at=self.clock.moment().unix,
            )
            writer.add_campaign(campaign)
        return campaign

    def campaign(self, campaign_id: str) -> Campaign:
        """One campaign as it is now.

        Raises:
            OperationRefused: no such campaign.
        """
        with self.repository.read() as reader:
            campaign = reader.campaign(campaign_id)
        if campaign is None:
            raise OperationRefused(f"there is no campaign {campaign_id}: see `covey round status`")
        return campaign

    def campaigns(self, *, active: bool = False) -> tuple[Campaign, ...]:
        """Campaigns, oldest first; with `active`, only those that have rounds to run."""
        with self.repository.read() as reader:
            return reader.campaigns("waiting", "running") if active else reader.campaigns()

    def rounds(
        self, campaign_id: str | None = None, *, status: RoundStatus | None = None, last: int | None = None
    ) -> tuple[RoundView, ...]:
        """Rounds with their figures, oldest first."""
        with self.repository.read() as reader:
            records = reader.rounds(campaign_id=campaign_id, status=status, last=last)
        return tuple(RoundView(record, RoundReport.from_bytes(record.report)) for record in records)

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

    def note_all_offline(self) -> None:
        """Marks every device offline: nobody is known to be there before the service hears of it."""
        now = self.clock.moment().unix
        with self.repository.write() as writer:
            for device in writer.devices():
                if device.online:
                    gone = DeviceStatus(session=bytes(32), online=False, models={})
                    writer.note_status(device.device_id, gone, device.last_seen or now)
