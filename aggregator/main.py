"""The composition root: the one place where the core meets its adapters, and the functions to use in process.

STATE/aggregator.json    name of the fleet, address of the broker
STATE/keys/              the fleet's CA and the operator's key
STATE/aggregator.db      the repository
STATE/registry/          artefacts and signed manifests
STATE/aggregator.lock    held by the service while it runs
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from aggregator.adapters import keyfiles
from aggregator.adapters.mqtt import MqttTransport
from aggregator.adapters.objects import DirectoryStore
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.tls import TlsFiles
from aggregator.clock import SystemClock
from aggregator.fleet.authority import Authority
from aggregator.operations import LiveRound, Model, OperationRefused, Operator, RoundView
from aggregator.records import Campaign, Device, Version
from aggregator.service import Service
from aggregator.settings import CampaignRequest
from protocol.broker_address import BrokerAddress
from protocol.enrolment import EnrolmentBundle
from protocol.fields import Slug

__all__ = [
    "AlreadyRunning",
    "CampaignRequest",
    "LiveRound",
    "Model",
    "NotInitialised",
    "OperationRefused",
    "Operator",
    "RoundView",
    "default_state",
    "enrol",
    "init",
    "is_running",
    "open_operator",
    "publish",
    "run",
    "start_rounds",
]

DEFAULT_BROKER = "mqtt://127.0.0.1:1883"
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)
logger = logging.getLogger(__name__)


class NotInitialised(Exception):
    """The state directory holds no aggregator."""


class AlreadyRunning(Exception):
    """Another service runs on this state directory."""


class Settings(BaseModel):
    """What `aggregator.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: str
    broker: str = DEFAULT_BROKER
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None


@dataclass(frozen=True)
class StateDirectory:
    """Where everything of one aggregator lies."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """Name of the fleet, address of the broker."""
        return self.path / "aggregator.json"

    @property
    def keys(self) -> Path:
        """The fleet's CA and the operator's key."""
        return self.path / "keys"

    @property
    def database(self) -> Path:
        """The repository."""
        return self.path / "aggregator.db"

    @property
    def registry(self) -> Path:
        """Artefacts and signed manifests."""
        return self.path / "registry"

    @property
    def lock(self) -> Path:
        """Held by the service while it runs."""
        return self.path / "aggregator.lock"

    def settings(self) -> Settings:
        """Reads the settings.

        Raises:
            NotInitialised: there are none, or they cannot be used.
        """
        try:
            return Settings.model_validate_json(self.settings_file.read_bytes())
        except FileNotFoundError as error:
            raise NotInitialised(f"{self.path} holds no aggregator: run `covey aggregator init`") from error
        except (OSError, ValidationError) as error:
            raise NotInitialised(f"{self.settings_file} cannot be used: {error}") from error


def default_state() -> Path:
    """COVEY_STATE, else the place for state of this user."""
    given = os.environ.get("COVEY_STATE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "covey"


def init(state: Path, *, fleet: str = "covey", broker: str = DEFAULT_BROKER, insecure: bool = False) -> None:
    """Makes a state directory: keys, CA, database and registry, readable by their owner only.

    Args:
        state: the directory; made when it is not there.
        fleet: name of the fleet.
        broker: address of the broker.
        insecure: allow an unencrypted broker on another machine.

    Raises:
        FileExistsError: it holds an aggregator already; nothing was changed.
        InvalidAddress, ValueError: a name or address that cannot be used.
    """
    try:
        _SLUG.validate_python(fleet)
    except ValidationError as error:
        raise ValueError("a fleet's name has lower-case letters, digits and hyphens, at most 63") from error
    BrokerAddress.parse(broker, insecure=insecure)
    place = StateDirectory(state)
    if place.settings_file.exists() or place.keys.exists():
        raise FileExistsError(f"{state} holds an aggregator already")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)
    moment = SystemClock().moment()
    authority = Authority.create(fleet, now=int(moment.unix), serial=secrets.randbits(120) | 1)
    keyfiles.save(authority, place.keys)
    with _private_files():
        SqlRepository.in_file(place.database).close()
        DirectoryStore(place.registry)
        # Last: a directory with settings is a complete one.
        content = Settings(fleet=fleet, broker=broker).model_dump(mode="json", exclude_none=True)
        place.settings_file.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def open_operator(state: Path) -> Iterator[Operator]:
    """Opens the operations on a state directory; the service may be running or not.

    Example:
        with open_operator(state) as operator:
            campaign = operator.start_rounds(CampaignRequest("watch", rounds=3))
            views = operator.rounds(campaign.campaign_id)

    Raises:
        NotInitialised, UnusableKeys, RepositoryError: it says what to do.
    """
    place = StateDirectory(state)
    place.settings()
    with _private_files():
        repository = SqlRepository.in_file(place.database)
    try:
        store = DirectoryStore(place.registry)
        yield Operator(repository, store, keyfiles.load(place.keys), SystemClock())
    finally:
        repository.close()


def enrol(state: Path, request: bytes, *, name: str | None = None) -> EnrolmentBundle:
    """Enrols a device by its signing request (PKCS#10, DER)."""
    with open_operator(state) as operator:
        return operator.enrol(request, name=name)


def devices(state: Path) -> tuple[Device, ...]:
    """Every enrolled device."""
    with open_operator(state) as operator:
        return operator.devices()


def publish(state: Path, directory: Path) -> Version:
    """Publishes the model in a directory: `manifest.json`, `model.tflite` and `weights.bin`.

    Raises:
        PublishRefused, OSError: it says what to do.
    """
    manifest, graph, weights = (
        (directory / name).read_bytes() for name in ("manifest.json", "model.tflite", "weights.bin")
    )
    with open_operator(state) as operator:
        return operator.publish(manifest, graph, weights)


def start_rounds(state: Path, request: CampaignRequest) -> Campaign:
    """Asks for rounds; the running service picks them up."""
    with open_operator(state) as operator:
        return operator.start_rounds(request)


def is_running(state: Path) -> bool:
    """Whether a service runs on this state directory."""
    try:
        with _lock(StateDirectory(state), probe=True):
            return False
    except AlreadyRunning:
        return True


def run(state: Path, stop: threading.Event, *, broker: str | None = None, insecure: bool = False) -> None:
    """Runs the service until `stop` is set.

    Args:
        state: the state directory.
        stop: ends the service.
        broker: address to use in place of the one in the settings.
        insecure: allow an unencrypted broker on another machine.

    Raises:
        AlreadyRunning, NotInitialised, UnusableKeys, RepositoryError, InvalidAddress: it says what to do.
    """
    place = StateDirectory(state)
    settings = place.settings()
    address = BrokerAddress.parse(broker or settings.broker, insecure=insecure)
    tls = TlsFiles(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    with _lock(place), open_operator(state) as operator:
        operator.note_all_offline()
        transport = MqttTransport(address, f"covey-aggregator-{settings.fleet}", tls)
        # What faces the network has no use for the CA's key.
        authority = replace(operator.authority, ca_key=None)
        service = Service(operator.repository, operator.store, authority, transport, operator.clock)
        transport.start()
        logger.info("aggregator of %s, state in %s, broker %s", settings.fleet, state, address)
        try:
            service.run(stop)
        finally:
            transport.stop()


@contextlib.contextmanager
def _lock(place: StateDirectory, *, probe: bool = False) -> Iterator[None]:
    # A lock of the kernel, not a file with a process id: it ends with the process, however that ends.
    if not place.path.is_dir():
        raise NotInitialised(f"{place.path} holds no aggregator: run `covey aggregator init`")
    descriptor = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # Somebody who only looks holds it for an instant: that must not keep a service from starting.
        patience = time.monotonic() + (0.0 if probe else 1.0)
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if probe else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= patience:
                    raise AlreadyRunning(f"another aggregator runs on {place.path}") from error
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
