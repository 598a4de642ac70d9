"""How a device is set up, as plain functions: its key, its place in a fleet, its owner's policy.

Imports are inside the functions, so that a process holds in memory only what its command needs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_client.policy import DevicePolicy
    from protocol.enrolment import EnrolmentAnswer, EnrolmentBundle, EnrolmentTicket


def initialise(state: Path, device_id: str) -> bytes:
    """Makes the device's key in a state directory, once; returns its signing request (PKCS#10, DER).

    Raises:
        CredentialError: the name is not possible, or the directory belongs to another enrolled device.
        StorageError: the directory cannot be written.
    """
    from edge_client.adapters.credentials import create_identity

    return create_identity(state, device_id)


def enrol(state: Path, bundle: EnrolmentBundle, *, now: int | None = None) -> None:
    """Takes an enrolment bundle over; doing it again with a newer one keeps ledger and used round ids.

    Args:
        state: the device's directory.
        bundle: of the operator.
        now: seconds since 1970; by default this machine's clock.

    Raises:
        CredentialError: the bundle is not for this device, or does not verify.
        StorageError: the directory cannot be written.
    """
    from edge_client.adapters.credentials import save_enrolment
    from edge_client.adapters.store import DeviceStore

    save_enrolment(state, bundle, now=int(time.time()) if now is None else now)
    # Made now, so that `status` and `privacy` have something to read before the first run.
    DeviceStore.open(state).close()


def enrol_by_ticket(state: Path, ticket: EnrolmentTicket) -> EnrolmentAnswer:
    """Joins a fleet by a ticket, or tries to, once; the key is made here, before, and stays.

    Doing it again, after a power cut or with a new ticket for the same name, keeps key, ledger and used round
    ids.

    Returns:
        What the service answered; the device is enrolled.

    Raises:
        EnrolmentFailed: it says what to do, and whether to come again.
        CredentialError: the directory is of another enrolled device, or the answer does not hold together.
        StorageError: the directory cannot be written.
    """
    from edge_client.adapters import enrolment_api

    answer = enrolment_api.enrol(ticket, initialise(state, ticket.name))
    if answer.bundle.device_id != ticket.name:
        # The fleet's record of the ticket counts, not the line that it came as.
        initialise(state, answer.bundle.device_id)
    enrol(state, answer.bundle, now=answer.time)
    return answer


def set_policy(state: Path, policy: DevicePolicy) -> None:
    """Writes the owner's policy into a state directory.

    Raises:
        StorageError: the directory cannot be written.
    """
    from edge_client.adapters.credentials import POLICY, save_policy
    from edge_client.adapters.files import private_directory

    save_policy(private_directory(state) / POLICY, policy)
