"""`run`: the device's client, put together from its parts, until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING

from edge_client import __version__, cli
from edge_client.adapters import memory, priority
from edge_client.commands.settings import configuration_of, example_source
from edge_client.commands.state_lock import locked
from edge_client.stopping import StopWish

if TYPE_CHECKING:
    from edge_client.adapters.serving import PredictionServers


def run(options: argparse.Namespace) -> None:
    """Takes part in the fleet's rounds until a signal says stop."""
    wish = StopWish()
    wish.hear()
    if options.priority == "background":
        priority.give_way()
    import secrets
    from functools import partial

    from edge_client.adapters.credentials import POLICY, load_credentials, load_policy, tls_files
    from edge_client.adapters.mqtt import LinkSettings, MqttLink
    from edge_client.adapters.notify import Notifier
    from edge_client.adapters.own_client import OwnClient
    from edge_client.adapters.readings import FieldReader
    from edge_client.adapters.renewal_files import RenewalFiles
    from edge_client.adapters.store import DeviceStore
    from edge_client.adapters.surroundings import Surroundings
    from edge_client.adapters.tls import TlsFiles
    from edge_client.adapters.trial import try_certificate
    from edge_client.adapters.uses import VersionUses
    from edge_client.adapters.worker import Worker
    from edge_client.daemon import Daemon
    from edge_client.inbox import Inbox, Stop
    from edge_client.pausing import Gate
    from edge_client.profile import Profile
    from edge_client.renewing import Renewer
    from edge_client.watch import Watch
    from protocol.broker_address import BrokerAddress

    _start_logging(options.log_level)
    if wish.there:
        return
    renewal = RenewalFiles(options.state)
    if renewal.unfinished:
        lock = locked(options.state)
        renewal.finish()
        lock.release()
    credentials = load_credentials(options.state)
    broker = options.broker or os.environ.get("COVEY_BROKER") or credentials.bundle.broker
    if broker is None:
        raise cli.CommandFailed("say where the fleet meets, its enrolment did not: --broker mqtts://HOST")
    address = BrokerAddress.parse(broker, insecure=options.insecure)
    if options.policy is not None and not options.policy.is_file():
        raise cli.CommandFailed(f"there is no policy file {options.policy}")
    profile = Profile.enrolled(
        credentials.bundle,
        credentials.identity,
        policy=load_policy(options.policy or options.state / POLICY),
        models=frozenset(options.model) if options.model else None,
    )
    own = tls_files(options.state)
    tls = TlsFiles(options.ca or own.ca, options.cert or own.certificate, options.key or own.key)
    lock = locked(options.state)
    runtime = load_runtime()
    inbox = Inbox()
    wish.tell(lambda: inbox.put(Stop()))
    data, fields = example_source(options), FieldReader(options.state, options.data)
    limits = configuration_of(options).conditions
    gate = Gate(limits.patience_seconds)
    link = MqttLink(LinkSettings(profile.device_id, address, tls, options.mqtt_version), sink=inbox.from_link)
    # A certificate from elsewhere is renewed elsewhere.
    renewer = (
        Renewer(renewal, credentials, partial(try_certificate, address), secrets.SystemRandom().random)
        if options.cert is None and options.key is None
        else None
    )
    uses = VersionUses(options.state)
    servers = _prediction_servers(options)
    with DeviceStore.open(options.state) as store, uses.armed():
        worker = Worker(store.blobs, data, fields, inbox.put, gate=gate, uses=uses)
        daemon = Daemon(
            profile,
            store,
            link,
            worker,
            data,
            fields,
            inbox,
            client_version=__version__,
            runtime=runtime,
            max_download_rate=options.max_download_rate,
            uses=uses,
            watch=Watch(Surroundings(metered=limits.metered_interfaces), limits, gate),
            notifier=Notifier(),
            renewer=renewer,
            tls=tls,
            own=OwnClient.here(options.state),
        )
        logging.getLogger("covey.edge").info("started device=%s broker=%s", profile.device_id, address)
        if servers is not None:
            servers.start()
        try:
            daemon.run()
        finally:
            if servers is not None:
                servers.stop()
    lock.release()
    logging.getLogger("covey.edge").info("stopped device=%s", profile.device_id)


def load_runtime() -> str:
    """Loads the TensorFlow Lite runtime; returns its name and version.

    Raises:
        cli.CommandFailed: there is none, or it does not load here.
    """
    memory.give_back()  # of all that was imported until now, which would add to the largest there ever is
    try:
        import_module("edge_client.adapters.tflite")
    except (ImportError, OSError) as error:
        raise cli.CommandFailed(f"the TensorFlow Lite runtime does not load: {error}") from error
    return runtime_name()


def runtime_name() -> str:
    """The TensorFlow Lite runtime of this machine, without its interpreter.

    Packages say their own version: reading their metadata would load a megabyte of modules for good.
    """
    for name in ("tflite_runtime", "ai_edge_litert"):
        try:
            return f"{name.replace('_', '-')} {import_module(name).__version__}"
        except ImportError:
            continue
    return "none"


def _prediction_servers(options: argparse.Namespace) -> PredictionServers | None:
    """Whoever answers other programs' predictions, if the owner wants that."""
    settings = configuration_of(options).predict
    if settings is None:
        return None
    from edge_client.adapters.serving import PredictionServers

    return PredictionServers(settings, options.state)


def _start_logging(level: str) -> None:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])
