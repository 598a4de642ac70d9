"""The composition root: the one place where the core meets its adapters, and the functions to use in process.

STATE/aggregator.json    name of the fleet, addresses of the broker and of the database
STATE/keys/              the fleet's CA and the operator's key
STATE/aggregator.db      the repository, unless it is in PostgreSQL
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

from aggregator.adapters import keyfiles, sql_migration
from aggregator.adapters.cores import Cores
from aggregator.adapters.mqtt import MqttTransport
from aggregator.adapters.objects import DirectoryStore
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import parse_url, url_of_file, without_password
from aggregator.adapters.tls import TlsFiles
from aggregator.clock import SystemClock
from aggregator.fleet.authority import Authority
from aggregator.operations import LiveRound, Model, OperationRefused, Operator, RoundView
from aggregator.records import Campaign, Device, Version
from aggregator.repository import Repository
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
    "migrate",
    "open_operator",
    "publish",
    "run",
    "start_rounds",
]

DEFAULT_BROKER = "mqtt://127.0.0.1:1883"
DATABASE_VARIABLE = "COVEY_DATABASE_URL"
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)
logger = logging.getLogger(__name__)


class NotInitialised(Exception):
    """The state directory holds no aggregator."""


class AlreadyRunning(Exception):
    """Another service runs on this state directory."""


class Settings(BaseModel):
    """What `aggregator.json` holds.

    Attributes:
        database: URL of a PostgreSQL database; None for SQLite in the state directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: str
    broker: str = DEFAULT_BROKER
    database: str | None = None
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

    def database_url(self) -> str:
        """Where the repository is: COVEY_DATABASE_URL, else what the settings say.

        Raises:
            NotInitialised: the settings hold a password, and others can read them.
        """
        given = os.environ.get(DATABASE_VARIABLE) or self.settings().database
        if given is None:
            return url_of_file(self.database)
        if not os.environ.get(DATABASE_VARIABLE) and parse_url(given).password is not None:
            mode = self.settings_file.stat().st_mode
            if mode & 0o077:
                name = self.settings_file
                raise NotInitialised(f"{name} holds a password that others can read: chmod 600 {name}")
        return given

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

    With COVEY_DATABASE_URL, the database is that one; the settings remember its URL without the password.

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
    database = os.environ.get(DATABASE_VARIABLE)
    remembered = without_password(database) if database else None
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)
    moment = SystemClock().moment()
    authority = Authority.create(fleet, now=int(moment.unix), serial=secrets.randbits(120) | 1)
    keyfiles.save(authority, place.keys)
    with _private_files():
        sql_migration.migrate(database or url_of_file(place.database))
        DirectoryStore(place.registry)
        # Last: a directory with settings is a complete one.
        settings = Settings(fleet=fleet, broker=broker, database=remembered)
        content = settings.model_dump(mode="json", exclude_none=True)
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
    with _open_repository(place) as repository:
        yield _operator(place, repository)


@contextlib.contextmanager
def _open_repository(place: StateDirectory) -> Iterator[SqlRepository]:
    place.settings()
    url = place.database_url()
    if url == url_of_file(place.database) and not place.database.exists():
        # Opening would make an empty one.
        raise NotInitialised(f"{place.database} is gone: restore it, or run `covey aggregator migrate`")
    with _private_files():
        repository = SqlRepository(url)
    with contextlib.closing(repository):
        yield repository


def _operator(place: StateDirectory, repository: Repository) -> Operator:
    return Operator(repository, DirectoryStore(place.registry), keyfiles.load(place.keys), SystemClock())


def migrate(state: Path) -> tuple[str | None, str]:
    """Brings the database to the schema of this Covey; returns (schema before, schema now).

    Raises:
        AlreadyRunning: the service runs: stop it first.
        NotInitialised, RepositoryError: it says what to do; nothing was changed.
    """
    place = StateDirectory(state)
    place.settings()
    with _lock(place), _private_files():
        return sql_migration.migrate(place.database_url())


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
    with _lock(place), _open_repository(place) as repository, repository.claim():
        operator = _operator(place, repository)
        operator.note_all_offline()
        transport = MqttTransport(address, f"covey-aggregator-{settings.fleet}", tls)
        # What faces the network has no use for the CA's key.
        authority = replace(operator.authority, ca_key=None)
        with Cores() as cores:
            service = Service(
                operator.repository,
                operator.store,
                authority,
                transport,
                operator.clock,
                unmask=cores.unmask,
            )
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
