"""The state directory: what lies where, and that one service at a time works on it.

STATE/aggregator.json    name of the fleet, addresses of the broker and of the database
STATE/keys/              the fleet's CA and the operator's key
STATE/aggregator.db      the repository, unless it is in PostgreSQL
STATE/registry/          artefacts and signed manifests; copies of them, when they are in an object store
STATE/aggregator.lock    held by the service while it runs
STATE/api/               certificate of the API, and how to reach it while it runs
STATE/ca.pem             the fleet's CA, for who connects to the API from elsewhere
STATE/broker/            what the broker is started with, and what it keeps
STATE/admin-token        the first token: take it to `covey login`, then remove this file
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aggregator.adapters.objects import DirectoryStore
from aggregator.adapters.objects_s3 import S3Store
from aggregator.adapters.sql_engine import parse_url, url_of_file
from aggregator.assigning import Promotion
from aggregator.downloads import DownloadLimits
from aggregator.registry.artefacts import ArtefactStore
from aggregator.retention import Retention
from aggregator.web.limit_settings import Limits
from aggregator.web.listen import DEFAULT_LISTEN
from aggregator.web.oidc_settings import OidcSettings
from protocol.enrolment import ApiUrl

DEFAULT_BROKER = "mqtt://127.0.0.1:1883"
DATABASE_VARIABLE = "COVEY_DATABASE_URL"


class NotInitialised(Exception):
    """The state directory holds no aggregator."""


class AlreadyRunning(Exception):
    """Another service runs on this state directory."""


class Settings(BaseModel):
    """What `aggregator.json` holds.

    Attributes:
        fleet: its name, which is in every certificate and every plan.
        broker: where the fleet meets.
        database: URL of a PostgreSQL database; None for SQLite in the state directory.
        objects: address of an object store, such as `s3://bucket/prefix`; None for the registry directory.
        objects_endpoint: URL of its server; Amazon's when None.
        tls_ca: PEM of who signed the broker's certificate; as all paths here, it may be relative to the state
            directory.
        tls_certificate: PEM that the broker knows us by.
        tls_key: its key.
        listen: where the API is; see `aggregator.web.listen.ListenAddress`.
        names: host names and addresses that its certificate is to hold.
        api_certificate: PEM of a certificate from elsewhere, as browsers want; the CA's by default.
        api_key: its key.
        api_ca: PEM of who issued it, by which devices check it that come with a ticket.
        api_url: of the API as devices reach it, `https://host:8443`; its certificate holds that name, too.
        ca_key: PEM of the CA's private key, when it is not among the keys: on a disk that is there at times,
            so that devices are enrolled at these times only.
        oidc: how people sign in.
        promotion: `auto` gives every new version to the fleet; `manual` leaves it a candidate until a rollout
            has brought it to everybody. Rounds go on from the newest version either way.
        downloads: how fast models go out.
        limits: how much anybody may ask of the API.
        keep: what is kept, and how long.
        publishers: Ed25519 public keys, hexadecimal: with any of them, only signed models are published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: str
    broker: str = DEFAULT_BROKER
    database: str | None = None
    objects: str | None = None
    objects_endpoint: str | None = None
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    listen: str = DEFAULT_LISTEN
    names: tuple[str, ...] = ()
    api_certificate: Path | None = None
    api_key: Path | None = None
    api_ca: Path | None = None
    api_url: ApiUrl | None = None
    ca_key: Path | None = None
    oidc: OidcSettings | None = None
    promotion: Promotion = Promotion.AUTO
    downloads: DownloadLimits = DownloadLimits()
    limits: Limits = Limits()
    keep: Retention = Retention()
    publishers: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


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
        """Artefacts and signed manifests, or copies of them."""
        return self.path / "registry"

    @property
    def api(self) -> Path:
        """Certificate of the API, and how to reach it while it runs."""
        return self.path / "api"

    @property
    def broker(self) -> Path:
        """What the broker is started with."""
        return self.path / "broker"

    @property
    def lock(self) -> Path:
        """Held by the service while it runs."""
        return self.path / "aggregator.lock"

    def file(self, path: Path | None) -> Path | None:
        """A path of the settings: relative to the state directory, so that the whole of it can be moved."""
        return None if path is None else self.path / path

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


def open_store(place: StateDirectory, settings: Settings) -> ArtefactStore:
    """Opens the artefact store that `settings` name.

    Raises:
        NotInitialised, StoreUnavailable: it says what to do.
    """
    if settings.objects is None:
        return DirectoryStore(place.registry)
    try:
        return S3Store(settings.objects, place.registry, endpoint=settings.objects_endpoint)
    except ValueError as error:
        raise NotInitialised(f"{place.settings_file}: {error}") from error


def default_state() -> Path:
    """COVEY_STATE, else the place for state of this user."""
    given = os.environ.get("COVEY_STATE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "covey"


@contextlib.contextmanager
def lock(place: StateDirectory, *, probe: bool = False) -> Iterator[None]:
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
def private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
