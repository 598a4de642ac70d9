"""The part of the repository that holds devices, their certificates and their tickets."""

from __future__ import annotations

from typing import Protocol

from aggregator.fleet.enrolment import EnrolmentToken
from aggregator.records import ClientCount, Device, DeviceFilter, DeviceState, FleetSize, IssuedCertificate
from protocol.messages import DeviceStatus


class FleetReader(Protocol):
    """What can be read of it; see `aggregator.repository`."""

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

    def client_counts(self) -> tuple[ClientCount, ...]:
        """How many devices of the fleet run each version of the client, by version and system."""
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


class FleetWriter(Protocol):
    """What can be changed; see `aggregator.repository`."""

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
