"""What an operator does about devices that leave the fleet, or move within it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from aggregator.clock import Clock
from aggregator.records import Device, DeviceState
from aggregator.refusals import OperationRefused, there
from aggregator.repository import Repository

RETIRED = "retired"
"""Why a retired device's certificates are revoked."""


class LifecycleOperations:
    """The part of `aggregator.operations.Operator` about the end of a device, and its place."""

    repository: Repository
    clock: Clock

    def revoke(self, device_id: str, reason: str) -> Device:
        """Takes a device's right to be in the fleet: it is stolen, or lies, or may be either.

        The service tells the broker within seconds, selects it for no round, and lets rounds that run go on
        without it. A ticket that says so lets it in again.

        Raises:
            NoSuch: it is not enrolled.
            OperationRefused: it is revoked already.
        """
        return self._dismiss(device_id, "revoked", reason)

    def retire(self, device_id: str) -> Device:
        """Ends a device's time in the fleet; what is done is what is done to one that is revoked.

        Raises:
            NoSuch: it is not enrolled.
            OperationRefused: it is revoked or retired already.
        """
        return self._dismiss(device_id, "retired", RETIRED)

    def move(self, device_id: str, labels: Iterable[str]) -> Device:
        """Gives a device labels; `site=south` takes the place of `site=north`, and other labels stay.

        What follows from labels, such as pins, rollouts and where campaigns run, follows at the next look.

        Raises:
            NoSuch: it is not enrolled.
            OperationRefused: it is not in the fleet any more.
        """
        given = frozenset(labels)
        keys = {label.partition("=")[0] for label in given if "=" in label}
        with self.repository.write() as writer:
            device = there(writer.device(device_id), f"no device {device_id}: see `covey device list`")
            if device.state != "active":
                raise OperationRefused(f"{device_id} is {device.state}: it has no place any more")
            kept = {
                label for label in device.labels if "=" not in label or label.partition("=")[0] not in keys
            }
            moved = tuple(sorted(given | kept))
            writer.set_labels(device_id, moved)
        return replace(device, labels=moved)

    def _dismiss(self, device_id: str, state: DeviceState, reason: str) -> Device:
        now = self.clock.moment().unix
        with self.repository.write() as writer:
            device = there(writer.device(device_id), f"no device {device_id}: see `covey device list`")
            if device.state == "revoked" or device.state == state:
                raise OperationRefused(f"{device_id} is {device.state} already")
            writer.set_device_state(device_id, state)
            for certificate in writer.certificates(device_id, revoked=False):
                writer.revoke_certificate(certificate.serial, now, reason)
        return replace(device, state=state)
