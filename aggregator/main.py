"""The composition root: where the core meets its adapters, and the functions to use in process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import TypeAdapter, ValidationError

from aggregator.access.roles import Role
from aggregator.adapters import broker_files, keyfiles, sql_migration
from aggregator.adapters.cores import Cores
from aggregator.adapters.mqtt import MqttTransport
from aggregator.adapters.objects_s3 import check_address
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import url_of_file, without_password
from aggregator.adapters.tls import TlsFiles
from aggregator.client import Client
from aggregator.clock import SystemClock
from aggregator.doorkeeper import Doorkeeper
from aggregator.fleet import access
from aggregator.fleet.authority import Authority, EnrolmentRefused
from aggregator.fleet.broker import ACCESS_FILE
from aggregator.fleet.enrolment import Doorway
from aggregator.operations import Model, OperationRefused, Operator
from aggregator.private_file import replace_private
from aggregator.records import Campaign, Device, IssuedCertificate, Version
from aggregator.renewals import Renewals
from aggregator.repository import Repository
from aggregator.revoked_list import RevokedList
from aggregator.round_operations import LiveRound, RoundView
from aggregator.service import Service
from aggregator.settings import CampaignRequest
from aggregator.state import (
    DATABASE_VARIABLE,
    DEFAULT_BROKER,
    AlreadyRunning,
    NotInitialised,
    Settings,
    StateDirectory,
    default_state,
    lock,
    open_store,
    private_files,
)
from aggregator.web.listen import ListenAddress
from aggregator.web.local import LocalEndpoint, new_local_token
from protocol.broker_address import BrokerAddress
from protocol.enrolment import ApiUrl, EnrolmentBundle
from protocol.fields import Slug
from protocol.identity import key_id

__all__ = [
    "DATABASE_VARIABLE",
    "DEFAULT_BROKER",
    "AlreadyRunning",
    "CampaignRequest",
    "LiveRound",
    "Model",
    "NotInitialised",
    "OperationRefused",
    "Operator",
    "RoundView",
    "connect",
    "default_state",
    "enrol",
    "init",
    "is_running",
    "migrate",
    "open_operator",
    "publish",
    "run",
    "start_rounds",
    "write_broker",
]

FIRST_TOKEN_SECONDS = 90 * 86_400
LOOP_SECONDS = 30.0
"""A main loop that has not gone round for so long is stuck."""
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)
_API_URL: TypeAdapter[str] = TypeAdapter(ApiUrl)
logger = logging.getLogger(__name__)


def init(
    state: Path,
    *,
    fleet: str = "covey",
    broker: str = DEFAULT_BROKER,
    insecure: bool = False,
    objects: str | None = None,
    objects_endpoint: str | None = None,
    broker_names: Sequence[str] = (),
    api_url: str | None = None,
) -> None:
    """Makes a state directory: keys, CA, database and registry, readable by their owner only.

    For a broker at an `mqtts://` address, also the files that it is started with; see `write_broker`.
    With COVEY_DATABASE_URL, the database is that one; the settings remember its URL without the password.

    Args:
        state: the directory; made when it is not there.
        fleet: name of the fleet.
        broker: address of the broker.
        insecure: allow an unencrypted broker on another machine.
        objects: where artefacts go, such as `s3://bucket/prefix`; by default into the state directory.
        objects_endpoint: URL of that server, unless it is Amazon's.
        broker_names: more host names and addresses that the broker's certificate is to hold.
        api_url: of the API as devices reach it, such as `https://hub.example:8443`; the service then listens
            at that port of every address.

    Raises:
        FileExistsError: it holds an aggregator already; nothing was changed.
        InvalidAddress, ValueError: a name or address that cannot be used.
    """
    try:
        _SLUG.validate_python(fleet)
    except ValidationError as error:
        raise ValueError("a fleet's name has lower-case letters, digits and hyphens, at most 63") from error
    address = BrokerAddress.parse(broker, insecure=insecure)
    reach = _reach(api_url)
    if objects is not None:
        check_address(objects)
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
    settings = Settings(
        fleet=fleet,
        broker=broker,
        database=remembered,
        objects=objects,
        objects_endpoint=objects_endpoint,
        **reach,
    )
    if address.tls:
        settings = settings.model_copy(update=_broker_identity(place))
        broker_files.write(place.broker, place.keys, authority, address, broker_names, now=moment.unix)
    with private_files():
        url = database or url_of_file(place.database)
        sql_migration.migrate(url)
        with contextlib.closing(SqlRepository(url)) as repository:
            operator = Operator(repository, open_store(place, settings), authority, SystemClock())
            token, _ = operator.create_token(
                role=Role.ADMIN,
                label="first",
                seconds=FIRST_TOKEN_SECONDS,
                created_by="covey aggregator init",
            )
        (state / "admin-token").write_text(token + "\n")
        (state / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(authority.ca))
        # Last: a directory with settings is a complete one.
        _save(place, settings)


def _reach(api_url: str | None) -> dict[str, str]:
    if api_url is None:
        return {}
    try:
        _API_URL.validate_python(api_url)
        port = urlsplit(api_url).port or 443
    except ValueError as error:
        raise ValueError(f"{api_url} is no address for devices: write https://HOST:8443") from error
    return {"api_url": api_url, "listen": f"0.0.0.0:{port}"}


def _broker_identity(place: StateDirectory) -> dict[str, Path]:
    keys = place.keys.relative_to(place.path)
    return {
        "tls_ca": Path("ca.pem"),
        "tls_certificate": keys / broker_files.IDENTITY_CERTIFICATE,
        "tls_key": keys / broker_files.IDENTITY_KEY,
    }


def write_broker(state: Path, names: Sequence[str] = ()) -> Path:
    """Writes what the broker is started with anew, with fresh certificates; returns the directory.

    For a certificate that is about to end, another name, or a state directory of an earlier Covey. The broker
    takes them at its next start, and so does the aggregator.

    Args:
        state: the state directory.
        names: host names and addresses that the broker's certificate is to hold, besides that of its address
            and this machine's own.

    Raises:
        OperationRefused: the address of the broker is not an `mqtts://` one.
        NotInitialised, UnusableKeys, EnrolmentRefused: it says what to do.
    """
    place = StateDirectory(state)
    settings = place.settings()
    address = BrokerAddress.parse(settings.broker, insecure=True)
    if not address.tls:
        raise OperationRefused(
            f"the broker is at {address}, without TLS: write an mqtts:// address in {place.settings_file}"
        )
    with private_files():
        now = SystemClock().moment().unix
        with _open_repository(place) as repository, repository.read() as reader:
            devices, revoked = reader.active_devices(), reader.certificates(revoked=True)
        broker_files.write(
            place.broker,
            place.keys,
            _authority(place),
            address,
            names,
            devices=devices,
            revoked=revoked,
            now=now,
        )
        if settings.tls_certificate is None:
            _save(place, settings.model_copy(update=_broker_identity(place)))
    return place.broker


def _save(place: StateDirectory, settings: Settings) -> None:
    content = settings.model_dump(mode="json", exclude_none=True)
    replace_private(place.settings_file, (json.dumps(content, indent=2) + "\n").encode())


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
    with private_files():
        repository = SqlRepository(url)
    with contextlib.closing(repository):
        yield repository


def _operator(place: StateDirectory, repository: Repository) -> Operator:
    settings = place.settings()
    authority = _authority(place)
    return Operator(
        repository,
        open_store(place, settings),
        authority,
        SystemClock(),
        _publishers(settings),
        Doorway(settings.api_url, _trust(place, settings, authority), settings.broker),
    )


def _authority(place: StateDirectory) -> Authority:
    """The fleet's keys, read anew: the CA's may have come, or gone."""
    return keyfiles.load(place.keys, place.file(place.settings().ca_key))


def _trust(place: StateDirectory, settings: Settings, authority: Authority) -> bytes | None:
    """DER of the certificate by which the API's own is checked."""
    if settings.api_certificate is None:
        return authority.ca
    issuer = place.file(settings.api_ca)
    if issuer is None:
        return None
    try:
        return x509.load_pem_x509_certificate(issuer.read_bytes()).public_bytes(Encoding.DER)
    except (OSError, ValueError) as error:
        raise NotInitialised(f"api_ca, {issuer}, is no certificate in a PEM file: {error}") from error


def migrate(state: Path) -> tuple[str | None, str]:
    """Brings the database to the schema of this Covey; returns (schema before, schema now).

    Raises:
        AlreadyRunning: the service runs: stop it first.
        NotInitialised, RepositoryError: it says what to do; nothing was changed.
    """
    place = StateDirectory(state)
    place.settings()
    with lock(place), private_files():
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
        with lock(StateDirectory(state), probe=True):
            return False
    except AlreadyRunning:
        return True


@contextlib.contextmanager
def connect(state: Path) -> Iterator[Client]:
    """Opens the API of a state directory: of the service that runs on it, else in this process.

    Raises:
        NotInitialised, UnusableKeys, RepositoryError: it says what to do.
    """
    place = StateDirectory(state)
    place.settings()
    endpoint = LocalEndpoint.read(place.api)
    if endpoint is not None:
        with Client(endpoint.url, endpoint.token, ca=state / "ca.pem") as client:
            yield client
        return
    # It costs half a second to import, and a running service has it already.
    from aggregator.web.api import create_app
    from aggregator.web.context import Context, LocalKey
    from aggregator.web.in_process import URL, InProcess

    token, user = new_local_token()
    with open_operator(state) as operator:
        online = replace(operator, authority=replace(operator.authority, ca_key=None))
        context = Context(online, lambda: _authority(place), local=LocalKey.of(token, user))
        with Client(URL, token, transport=InProcess(create_app(context))) as client:
            yield client


def run(
    state: Path,
    stop: threading.Event,
    *,
    broker: str | None = None,
    insecure: bool = False,
    listen: str | None = None,
) -> None:
    """Runs the service until `stop` is set.

    Args:
        state: the state directory.
        stop: ends the service.
        broker: address to use in place of the one in the settings.
        insecure: allow an unencrypted broker on another machine.
        listen: where the API is, in place of what the settings say.

    Raises:
        AlreadyRunning, NotInitialised, UnusableKeys, RepositoryError, InvalidAddress, CannotListen,
        EnrolmentRefused: it says what to do.
    """
    # A web server and what it takes: no other command pays for it.
    from aggregator.telemetry.gauges import Gauges
    from aggregator.telemetry.metered import MeteredTransport
    from aggregator.telemetry.metrics import ServiceMetrics
    from aggregator.telemetry.traces import tracing
    from aggregator.web.context import Vitals
    from aggregator.web.events import EventFeed
    from aggregator.web.observed import ObservedRepository
    from aggregator.web.server import CertificateFiles
    from aggregator.web.serving import serving

    place = StateDirectory(state)
    settings = place.settings()
    address = BrokerAddress.parse(broker or settings.broker, insecure=insecure)
    tls = TlsFiles(*map(place.file, (settings.tls_ca, settings.tls_certificate, settings.tls_key)))
    where = ListenAddress.parse(listen or settings.listen)
    own = None
    certificate, key = place.file(settings.api_certificate), place.file(settings.api_key)
    if certificate is not None and key is not None:
        own = CertificateFiles(certificate, key)
    feed = EventFeed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(place))
        opened = stack.enter_context(_open_repository(place))
        stack.enter_context(opened.claim())
        operator = _operator(place, opened)
        operator.note_all_offline()
        doorkeeper = _doorkeeper(place) if address.tls else None
        more = () if doorkeeper is None else (access.RESPONSES,)
        transport = MqttTransport(address, f"covey-aggregator-{settings.fleet}", tls, more=more)
        # What faces the network has no use for the CA's key.
        authority = replace(operator.authority, ca_key=None)
        metrics = ServiceMetrics(operator.repository)
        traces = stack.enter_context(tracing(operator.repository))
        repository = ObservedRepository(operator.repository, feed, (metrics, *traces))
        online = replace(operator, repository=repository, authority=authority)
        cores = stack.enter_context(Cores())
        beside = ThreadPoolExecutor(1, "unmasking")
        stack.callback(beside.shutdown, cancel_futures=True)
        service = Service(
            repository,
            operator.store,
            authority,
            MeteredTransport(transport, metrics),
            operator.clock,
            unmask=cores.unmask,
            beside=beside,
            promotion=settings.promotion,
            doorkeeper=doorkeeper,
            revoked_list=None if doorkeeper is None else _revoked_list(place),
            renewals=Renewals(lambda: _authority(place)),
            downloads=settings.downloads,
            retention=settings.keep,
        )

        def vitals() -> Vitals:
            age = operator.clock.moment().clock - service.turned
            trouble = service.trouble or ("" if doorkeeper is None else doorkeeper.trouble)
            return Vitals(broker=service.connected, loop=age < LOOP_SECONDS, trouble=trouble)

        def ready() -> dict[str, bool]:
            found = vitals()
            return {"broker": found.broker, "loop": found.loop, "work": not found.trouble}

        certificates = {
            "ca": state / "ca.pem",
            "broker": place.broker / broker_files.SERVER_CERTIFICATE,
            "aggregator": tls.certificate,
            "api": own.certificate if own else place.api / "server.pem",
        }
        known = {name: path for name, path in certificates.items() if path is not None}
        metrics.collect_with(Gauges(operator.repository, ready, known).collect)
        stack.enter_context(
            serving(
                place.api,
                online,
                lambda: _authority(place),
                feed,
                where,
                vitals=vitals,
                names=_names(settings),
                files=own,
                oidc=settings.oidc,
                metrics=metrics,
                limits=settings.limits,
            )
        )
        stack.callback(transport.stop)
        transport.start()
        logger.info("aggregator of %s, state in %s, broker %s", settings.fleet, state, address)
        service.run(stop)


def _doorkeeper(place: StateDirectory) -> Doorkeeper | None:
    file = place.broker / ACCESS_FILE
    if not file.exists():
        logger.warning(
            "the broker's access is not kept: where an earlier Covey set it up, run `covey aggregator "
            "broker`, and start it anew"
        )
        return None
    return Doorkeeper(lambda document: replace_private(file, document))


def _revoked_list(place: StateDirectory) -> RevokedList:
    def write(revoked: Sequence[IssuedCertificate]) -> bool:
        now = SystemClock().moment().unix
        wanted = frozenset(each.serial for each in revoked if each.expires_at > now)
        if wanted != broker_files.revoked_serials(place.broker):
            try:
                # The CA's key is read for this one signature: what runs on keeps none.
                broker_files.write_revoked(place.broker, _authority(place), revoked, now=now)
            except EnrolmentRefused:
                return False
        return True

    return RevokedList(write)


def _names(settings: Settings) -> tuple[str, ...]:
    """What clients call the API by, besides this machine's own names."""
    own = None if settings.api_url is None else urlsplit(settings.api_url).hostname
    return settings.names if own is None else (*settings.names, own)


def _publishers(settings: Settings) -> dict[str, Ed25519PublicKey]:
    keys = (Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)) for text in settings.publishers)
    return {key_id(key): key for key in keys}
