"""The composition root: where the core meets its adapters, and the functions to use in process."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from aggregator.adapters import broker_files, sql_migration
from aggregator.adapters.cores import Cores
from aggregator.adapters.mqtt import MqttTransport
from aggregator.adapters.tls import TlsFiles
from aggregator.client import Client
from aggregator.clock import SystemClock
from aggregator.doorkeeper import Doorkeeper
from aggregator.fleet import access
from aggregator.fleet.authority import EnrolmentRefused
from aggregator.fleet.broker import ACCESS_FILE
from aggregator.opened_state import authority_of, open_operator, open_repository, operator_of
from aggregator.operations import Model, OperationRefused, Operator
from aggregator.private_file import replace_private
from aggregator.records import Campaign, Device, IssuedCertificate, Version
from aggregator.renewals import Renewals
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
    private_files,
)
from aggregator.state_setup import init, write_broker
from aggregator.web.listen import ListenAddress
from aggregator.web.local import LocalEndpoint, new_local_token
from protocol.broker_address import BrokerAddress
from protocol.enrolment import EnrolmentBundle

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

LOOP_SECONDS = 30.0
"""A main loop that has not gone round for so long is stuck."""
logger = logging.getLogger(__name__)


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
        context = Context(online, lambda: authority_of(place), local=LocalKey.of(token, user))
        with Client(URL, token, transport=InProcess(create_app(context))) as client:
            yield client


def run(
    state: Path,
    stop: threading.Event,
    *,
    broker: str | None = None,
    insecure: bool = False,
    listen: str | None = None,
    loaded: Callable[[], object] = lambda: None,
) -> None:
    """Runs the service until `stop` is set.

    Args:
        state: the state directory.
        stop: ends the service.
        broker: address to use in place of the one in the settings.
        insecure: allow an unencrypted broker on another machine.
        listen: where the API is, in place of what the settings say.
        loaded: called once everything is imported and open, before the first step.

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
        opened = stack.enter_context(open_repository(place))
        stack.enter_context(opened.claim())
        operator = operator_of(place, opened)
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
            renewals=Renewals(lambda: authority_of(place)),
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
                lambda: authority_of(place),
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
        loaded()
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
                broker_files.write_revoked(place.broker, authority_of(place), revoked, now=now)
            except EnrolmentRefused:
                return False
        return True

    return RevokedList(write)


def _names(settings: Settings) -> tuple[str, ...]:
    """What clients call the API by, besides this machine's own names."""
    own = None if settings.api_url is None else urlsplit(settings.api_url).hostname
    return settings.names if own is None else (*settings.names, own)
