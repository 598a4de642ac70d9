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
from aggregator.campaign_operations import CampaignOperations
from aggregator.client_operations import ClientOperations
from aggregator.clock import Clock
from aggregator.enrolment_operations import EnrolmentOperations
from aggregator.fleet.authority import Authority
from aggregator.fleet.enrolment import Doorway
from aggregator.lifecycle_operations import LifecycleOperations
from aggregator.records import AuditEntry, Device, DeviceFilter, Version
from aggregator.refusals import NoSuch as NoSuch
from aggregator.refusals import OperationRefused as OperationRefused
from aggregator.refusals import there as _there
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import manifest_of, publish
from aggregator.registry.releases import check_model
from aggregator.repository import NotFound, Repository
from aggregator.rollout_operations import RolloutOperations
from aggregator.round_operations import RoundOperations
from models.manifest import ModelManifest
from protocol.client_release import CLIENT
from protocol.messages import DeviceStatus


@dataclass(frozen=True)
class Model:
    """A published version with its files."""

    manifest: ModelManifest
    graph: bytes
    weights: bytes


@dataclass(frozen=True)
class Operator(
    CampaignOperations,
    ClientOperations,
    EnrolmentOperations,
    LifecycleOperations,
    RolloutOperations,
    RoundOperations,
):
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
        """Published versions of models."""
        with self.repository.read() as reader:
            return tuple(each for each in reader.versions(model) if each.model != CLIENT)

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
        check_model(name)
        with self.repository.read() as reader:
            found = reader.newest_version(name) if version is None else reader.version(name, version)
        if found is None:
            what = f"{name} version {version}" if version else name
            raise NoSuch(f"there is no published {what}: see `covey model list`")
        manifest = manifest_of(found)
        return Model(manifest, self.store.read(manifest.graph), self.store.read(manifest.weights))

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
