"""Covey's own folder on the boot partition: the client, how to install it, and the way into the fleet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.flash.firstboot import FOLDER, ProvisionError
from edge_client import __version__
from protocol.broker_address import BrokerAddress, InvalidAddress
from protocol.enrolment import EnrolmentTicket
from protocol.errors import MalformedMessage

SETUP = Path(__file__).parents[1] / "device" / "setup.sh"
TICKET, SETTINGS, DIGESTS = "enrolment.ticket", "edge.env", "bundles.sha256"
DEFAULT_DATA = "/srv/covey"
_BUNDLE = re.compile(r"covey-[0-9A-Za-z.+]+-[a-z]+-[a-z0-9]+\.tar\.xz")
_PATH = re.compile(r"/[A-Za-z0-9._/-]{1,200}")


@dataclass(frozen=True)
class Client:
    """What every card of a fleet has in common.

    Attributes:
        bundles: made by `make bundle`; a device takes the one for its system.
        broker: where the fleet meets; None when its enrolment says it.
        data: folder of the device's own data.
    """

    bundles: tuple[Path, ...]
    broker: str | None = None
    data: str = DEFAULT_DATA

    def __post_init__(self) -> None:
        """Refuses what a device could not run.

        Raises:
            ProvisionError: it names the part.
        """
        for bundle in self.bundles:
            if not _BUNDLE.fullmatch(bundle.name) or not bundle.is_file():
                raise ProvisionError(f"{bundle} is no client bundle: `make bundle` makes them")
        if not self.bundles:
            raise ProvisionError("there is no client bundle: `make bundle`, or name one with --bundle")
        if not _PATH.fullmatch(self.data):
            raise ProvisionError(f"{self.data!r} is no absolute path of letters, digits, '.', '_' and '-'")
        try:
            if self.broker is not None:
                BrokerAddress.parse(self.broker)
        except InvalidAddress as error:
            raise ProvisionError(str(error)) from error


def usual_bundles(folder: Path = Path("dist")) -> tuple[Path, ...]:
    """The bundles of this version that `make bundle` left here."""
    return tuple(sorted(folder.glob(f"covey-{__version__}-*.tar.xz")))


def payload(client: Client, device_id: str, ticket: EnrolmentTicket | None) -> Mapping[str, bytes]:
    """Covey's files on the boot partition of one device, by path.

    Args:
        client: the same for every device.
        device_id: its name in the fleet.
        ticket: lets it enrol by itself; None when an operator does it over SSH.
    """
    bundles = {bundle.name: bundle.read_bytes() for bundle in client.bundles}
    digests = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in bundles.items())
    settings = f"COVEY_DEVICE_ID={device_id}\nCOVEY_DATA={client.data}\n"
    if client.broker is not None:
        settings += f"COVEY_BROKER={BrokerAddress.parse(client.broker)}\n"
    files = {
        **bundles,
        DIGESTS: digests.encode(),
        SETTINGS: settings.encode(),
        "setup.sh": SETUP.read_bytes(),
    }
    if ticket is not None:
        files[TICKET] = ticket.to_text().encode() + b"\n"
    return {f"{FOLDER}/{name}": content for name, content in files.items()}


def read_tickets(text: str, count: int) -> Sequence[EnrolmentTicket]:
    """Tickets for so many devices, one a line; each lets one device in.

    Raises:
        ProvisionError: there are too few, one of them twice, or a line that is none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) < count:
        raise ProvisionError(f"{count} devices need {count} tickets; there are {len(lines)}")
    if len(set(lines)) < len(lines):
        raise ProvisionError("a ticket is there twice: each lets one device in")
    try:
        return [EnrolmentTicket.from_text(line) for line in lines[:count]]
    except MalformedMessage as error:
        raise ProvisionError(str(error)) from error
