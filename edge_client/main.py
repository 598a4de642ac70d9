"""The composition root of the device: `covey-edge`, and the same steps as plain functions.

Imports are inside the functions, so that `--help` is quick and a process holds in memory only what its
command needs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client import __version__, cli
from edge_client.adapters import memory

if TYPE_CHECKING:
    from edge_client.adapters.files import Lock
    from edge_client.adapters.serving import PredictionServers
    from edge_client.configuration import EdgeConfiguration
    from edge_client.fields import FieldSource
    from edge_client.policy import DevicePolicy
    from edge_client.sources import DataSource
    from protocol.enrolment import EnrolmentAnswer, EnrolmentBundle, EnrolmentTicket

LOCK = "lock"
LOCK_SECONDS = 1.0
_CLOCK_SECONDS = 3_600.0
"""A clock that is off by more finds certificates not valid yet, or any more."""


class CommandFailed(Exception):
    """A command cannot do its work; the message says what to do.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, code: int = cli.EXIT_FAILED) -> None:
        super().__init__(message)
        self.code = code


# --- plain functions -------------------------------------------------------------------------------------


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


def load_runtime() -> str:
    """Loads the TensorFlow Lite runtime; returns its name and version.

    Raises:
        CommandFailed: there is none, or it does not load here.
    """
    memory.give_back()  # of all that was imported until now, which would add to the largest there ever is
    try:
        import_module("edge_client.adapters.tflite")
    except (ImportError, OSError) as error:
        raise CommandFailed(f"the TensorFlow Lite runtime does not load: {error}") from error
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


# --- commands --------------------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> None:
    from edge_client.adapters.credentials import REQUEST

    initialise(options.state, options.device_id)
    cli.say(f"key and signing request of {options.device_id} are in {options.state}")
    cli.say(f"next: have {options.state / REQUEST} signed by the fleet's operator, then")
    cli.say(f"      covey-edge enroll --state {options.state} --bundle FILE")


def _enroll(options: argparse.Namespace) -> None:
    from protocol.enrolment import EnrolmentBundle

    if options.ticket is not None:
        _enroll_by_ticket(options)
        return
    try:
        bundle = EnrolmentBundle.from_bytes(options.bundle.read_bytes())
    except OSError as error:
        raise CommandFailed(f"cannot read {options.bundle}: {error.strerror}") from error
    enrol(options.state, bundle)
    cli.say(f"{bundle.device_id} is enrolled in the fleet {bundle.fleet}")
    cli.say(f"next: covey-edge run --state {options.state} --data DIR")


def _enroll_by_ticket(options: argparse.Namespace) -> None:
    import secrets

    from edge_client.adapters.files import shred
    from edge_client.enrolling import EnrolmentFailed, TicketRefused, wait_seconds
    from protocol.enrolment import MAX_TICKET_CHARACTERS, EnrolmentTicket

    file = None if options.ticket == "-" else Path(options.ticket)
    try:
        with contextlib.nullcontext(sys.stdin) if file is None else file.open() as source:
            ticket = EnrolmentTicket.from_text(source.read(2 * MAX_TICKET_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"cannot read {options.ticket}: {error}") from error
    answer, attempt = None, 0
    while answer is None:
        try:
            answer = enrol_by_ticket(options.state, ticket)
        except TicketRefused:
            raise
        except EnrolmentFailed as error:
            if not options.retry:
                raise
            chance = secrets.randbelow(1_000) / 1_000
            seconds = wait_seconds(attempt, chance, error.seconds)
            cli.fail(f"{error}; coming again in {seconds:.0f} s")
            time.sleep(seconds)
            attempt += 1
    if file is not None:
        shred(file)
    cli.say(f"{answer.bundle.device_id} is enrolled in the fleet {answer.bundle.fleet}")
    if abs(answer.time - time.time()) > _CLOCK_SECONDS:
        cli.fail(
            f"this device's clock is off by {(time.time() - answer.time) / 86_400:+.1f} days: it reaches its "
            "fleet when the clock is right (timedatectl says whether the time is synchronised)"
        )
    cli.say(f"next: covey-edge run --state {options.state} --data DIR")


def _renew(options: argparse.Namespace) -> None:
    from edge_client.adapters.credentials import load_credentials
    from edge_client.adapters.renewal_files import RenewalFiles

    load_credentials(options.state)
    files = RenewalFiles(options.state)
    files.wish(new_key=options.new_key)
    if not _is_running(options.state):
        cli.say("the client does not run: it asks for a new certificate when it is started")
        return
    give_up = time.monotonic() + options.timeout
    while (outcome := files.outcome()) is None:
        if time.monotonic() >= give_up:
            raise CommandFailed("no answer yet: the client goes on asking; its log says more")
        time.sleep(0.2)
    if outcome != "renewed":
        raise CommandFailed(outcome)
    expires = _certificate_end(options.state)
    cli.say(f"renewed: the certificate is good until {expires}")


def _certificate_end(state: Path) -> str:
    from edge_client.adapters.credentials import load_credentials
    from protocol.renewal import Lifetime

    ends = Lifetime.of(load_credentials(state).bundle.certificate).ends
    return time.strftime("%Y-%m-%d", time.gmtime(ends))


def _run(options: argparse.Namespace) -> None:
    import secrets
    from functools import partial

    from edge_client.adapters.credentials import POLICY, load_credentials, load_policy, tls_files
    from edge_client.adapters.mqtt import LinkSettings, MqttLink
    from edge_client.adapters.notify import Notifier
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
    renewal = RenewalFiles(options.state)
    if renewal.unfinished:
        lock = _locked(options.state)
        renewal.finish()
        lock.release()
    credentials = load_credentials(options.state)
    broker = options.broker or os.environ.get("COVEY_BROKER") or credentials.bundle.broker
    if broker is None:
        raise CommandFailed("say where the fleet meets, its enrolment did not: --broker mqtts://HOST")
    address = BrokerAddress.parse(broker, insecure=options.insecure)
    if options.policy is not None and not options.policy.is_file():
        raise CommandFailed(f"there is no policy file {options.policy}")
    profile = Profile.enrolled(
        credentials.bundle,
        credentials.identity,
        policy=load_policy(options.policy or options.state / POLICY),
        models=frozenset(options.model) if options.model else None,
    )
    own = tls_files(options.state)
    tls = TlsFiles(options.ca or own.ca, options.cert or own.certificate, options.key or own.key)
    lock = _locked(options.state)
    runtime = load_runtime()
    inbox = Inbox()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: inbox.put(Stop()))
    data, fields = _data(options), FieldReader(options.state, options.data)
    limits = _configuration(options).conditions
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


def _data(options: argparse.Namespace) -> DataSource:
    """Where this device's examples come from: edge.toml, else --data, which a unit always sets."""
    from edge_client.adapters.credentials import CONFIGURATION

    configuration = _configuration(options)
    if configuration.data:
        from edge_client.adapters.sources import open_sources

        return open_sources(configuration.data, options.state)
    if options.data is None:
        path = options.config or options.state / CONFIGURATION
        raise CommandFailed(f"say where the examples come from: --data DIR, or a [[data]] table in {path}")
    from edge_client.adapters.data import NpzDirectory

    return NpzDirectory(options.data)


def _prediction_servers(options: argparse.Namespace) -> PredictionServers | None:
    """Whoever answers other programs' predictions, if the owner wants that."""
    settings = _configuration(options).predict
    if settings is None:
        return None
    from edge_client.adapters.serving import PredictionServers

    return PredictionServers(settings, options.state)


def _configuration(options: argparse.Namespace) -> EdgeConfiguration:
    from edge_client.adapters.credentials import CONFIGURATION, load_configuration

    if options.config is not None and not options.config.is_file():
        raise CommandFailed(f"there is no configuration file {options.config}")
    return load_configuration(options.config or options.state / CONFIGURATION)


def _status(options: argparse.Namespace) -> None:
    from edge_client import report

    status = report.status(options.state, running=_is_running(options.state))
    cli.say(cli.as_json(status) if options.json else report.status_text(status))


def _predict(options: argparse.Namespace) -> None:
    from edge_client import report
    from edge_client.adapters.uses import VersionUses
    from edge_client.local import Predictor, SocketPredictor

    if options.repeat < 1:
        raise CommandFailed("--repeat is at least 1", 2)
    uses = VersionUses(options.state)
    with contextlib.ExitStack() as stack:
        asked: Predictor | SocketPredictor
        if options.socket is None:
            # What a version does to this process is written down, so that `run` takes it back.
            stack.enter_context(uses.armed())
            asked = stack.enter_context(contextlib.closing(Predictor(options.state, uses=uses)))
        else:
            asked = stack.enter_context(SocketPredictor(options.socket))
        answer = report.predict(lambda x: asked.predict(x, options.model), options.input, options.repeat)
    cli.say(cli.as_json(answer) if options.json else report.prediction_text(answer))


def _personalise(options: argparse.Namespace) -> None:
    from edge_client import report
    from edge_client.adapters.worker import tflite_trainer
    from edge_client.personalisation import PersonalConfig

    try:
        config = PersonalConfig(options.epochs, options.learning_rate, gap=options.gap)
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    answer = report.personalise(options.state, _data(options), options.model, config, tflite_trainer)
    cli.say(cli.as_json(answer) if options.json else report.personal_text(answer))


def _reset(options: argparse.Namespace) -> None:
    from edge_client import report

    named = options.personal or options.local or options.recordings
    if named and (options.keep_identity or options.forget_ledger):
        raise CommandFailed("--keep-identity and --forget-ledger are for a reset of everything", 2)
    if options.model is not None and not (options.personal or options.local):
        raise CommandFailed("--model needs --personal or --local", 2)
    if not named:
        _reset_device(options)
        return
    if options.recordings:
        from edge_client.adapters.resetting import reset_recordings

        lock = _locked(options.state)
        names = reset_recordings(options.state)
        lock.release()
        cli.say(f"deleted the recordings of {', '.join(names)}" if names else "there are no recordings")
        return
    if options.local:
        # A client that runs would go on with those that it has read.
        lock = _locked(options.state)
        dropped = report.reset_local(options.state, options.model)
        lock.release()
        for model in dropped:
            cli.say(f"dropped the local parameters of {model}: they start anew with the next round")
        if not dropped:
            cli.say("there are no local parameters")
        return
    dropped = report.reset_personal(options.state, options.model)
    for model in dropped:
        cli.say(f"dropped the personal {model}: `predict` answers with the global version")
    if not dropped:
        cli.say("there is no personal model")


def _reset_device(options: argparse.Namespace) -> None:
    """Everything goes, after a question."""
    from edge_client.adapters.credentials import ENROLMENT, KEY
    from edge_client.adapters.resetting import reset_device
    from edge_client.adapters.store import DATABASE

    state = options.state
    if not any((state / name).exists() for name in (KEY, ENROLMENT, DATABASE)):
        raise CommandFailed(f"{state} holds no device", cli.EXIT_NOT_SET_UP)
    identity = "stay" if options.keep_identity else "go: it must be enrolled anew to take part again"
    cli.say(f"in {state}: models, personal models, local layers and recordings go")
    cli.say(f"  key and enrolment {identity}")
    if options.forget_ledger:
        cli.say("  the privacy ledger goes: what this device gave stays given, and its own limit forgets it")
    else:
        cli.say("  the privacy ledger stays: what this device gave stays given, and its limit must know")
    cli.say("  policy.json, fields.json and edge.toml stay")
    if not options.yes:
        if not sys.stdin.isatty():
            raise CommandFailed("nobody is there to ask: add --yes", 2)
        if input("type reset to go on: ").strip() != "reset":
            raise CommandFailed("nothing was changed")
    lock = _locked(state)
    reset_device(state, keep_identity=options.keep_identity, forget_ledger=options.forget_ledger)
    lock.release()
    cli.say("done; a memory card may keep copies of what was deleted where only a laboratory finds them")


def _privacy(options: argparse.Namespace) -> None:
    from edge_client import report

    ledger = report.privacy(options.state, int(time.time()))
    cli.say(cli.as_json(ledger) if options.json else report.privacy_text(ledger))


def _policy(options: argparse.Namespace) -> None:
    from edge_client.adapters.credentials import POLICY, load_policy

    if options.file is not None:
        if not options.file.is_file():
            raise CommandFailed(f"there is no policy file {options.file}")
        set_policy(options.state, load_policy(options.file))
    cli.say(load_policy(options.state / POLICY).to_bytes().decode().rstrip())


def _fields(options: argparse.Namespace) -> None:
    from edge_client import fields_report
    from edge_client.adapters.readings import FieldReader, load_fields, save_fields

    if options.action != "list" and options.name is None:
        raise CommandFailed(f"covey-edge fields {options.action} needs the NAME of a field", 2)
    fields = load_fields(options.state)
    if options.action == "set":
        fields = fields.declare(options.name, _source(options))
    elif options.action == "remove":
        fields = fields.withdraw(options.name)
    if options.action != "list":
        save_fields(options.state, fields)
    answer = fields_report.fields(fields, FieldReader(options.state, options.data).read)
    cli.say(cli.as_json(answer) if options.json else fields_report.fields_text(answer))


def _source(options: argparse.Namespace) -> FieldSource:
    """The source that `fields set` describes."""
    from edge_client.fields import field_source

    given: dict[str, Any]
    if options.value is not None:
        given = {"kind": "constant", "value": options.value}
    elif options.file is not None:
        given = {"kind": "file", "path": str(options.file.absolute()), "scale": options.scale}
    elif options.recordings:
        given = {"kind": "recordings", "scale": options.scale}
    else:
        raise CommandFailed("say where the number comes from: --value, --file or --recordings", 2)
    if options.summary is not None:
        given["summary"] = options.summary
    return field_source(given)


def _doctor(options: argparse.Namespace) -> None:
    from edge_client import doctor
    from edge_client.adapters.checks import Subject, examine
    from edge_client.configuration import InvalidConfiguration
    from edge_client.doctor import Finding

    findings: list[Finding] = []
    data = None
    try:
        data = _data(options) if options.data or _configuration(options).data else None
    except (CommandFailed, InvalidConfiguration) as error:
        findings.append(Finding("configuration", "failed", str(error), "mend edge.toml: covey-edge config"))
    broker = options.broker or os.environ.get("COVEY_BROKER")
    findings += examine(Subject(options.state, broker, options.insecure, data))
    cli.say(cli.as_json(doctor.as_dict(findings)) if options.json else doctor.text(findings))
    if doctor.worst(findings) == "failed":
        raise CommandFailed("something is wrong, see above")


def _config(options: argparse.Namespace) -> None:
    configuration = _configuration(options)
    if options.json:
        cli.say(cli.as_json(configuration.model_dump(mode="json")))
    else:
        cli.say(configuration.to_toml().rstrip())


_COMMANDS = {
    "init": _init,
    "enroll": _enroll,
    "run": _run,
    "renew": _renew,
    "status": _status,
    "predict": _predict,
    "personalise": _personalise,
    "reset": _reset,
    "privacy": _privacy,
    "config": _config,
    "doctor": _doctor,
    "fields": _fields,
    "policy": _policy,
}


def _locked(state: Path) -> Lock:
    """The lock of a device's state: as long as it is held, no client runs.

    Raises:
        CommandFailed: one runs.
    """
    from edge_client.adapters.files import Lock

    lock = Lock(state / LOCK)
    give_up = time.monotonic() + LOCK_SECONDS
    while not lock.acquire():
        # `status` holds the lock for a moment to see whether somebody runs.
        if time.monotonic() >= give_up:
            raise CommandFailed(f"another covey-edge runs on {state}: stop it first", cli.EXIT_RUNNING)
        time.sleep(0.05)
    return lock


def _is_running(state: Path) -> bool:
    from edge_client.adapters.files import Lock

    if not (state / LOCK).exists():
        return False
    lock = Lock(state / LOCK)
    free = lock.acquire()
    lock.release()
    return not free


def _start_logging(level: str) -> None:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _exit_code(error: Exception) -> int:
    from edge_client.adapters.credentials import CredentialError
    from edge_client.enrolling import TicketRefused
    from edge_client.prediction import NoModel

    if isinstance(error, CommandFailed):
        return error.code
    if isinstance(error, TicketRefused):
        return cli.EXIT_REFUSED
    if isinstance(error, NoModel):
        return cli.EXIT_NO_MODEL
    return cli.EXIT_NOT_SET_UP if isinstance(error, CredentialError) else cli.EXIT_FAILED


def _expected() -> tuple[type[Exception], ...]:
    """What a command may raise for a reason that its user can do something about."""
    from edge_client.adapters.credentials import CredentialError
    from edge_client.adapters.files import StorageError
    from edge_client.configuration import InvalidConfiguration
    from edge_client.enrolling import EnrolmentFailed
    from edge_client.fields import InvalidFields
    from edge_client.policy import InvalidPolicy
    from edge_client.prediction import PredictionFailed
    from edge_client.report import ReportError
    from edge_client.training import TrainingError
    from protocol.broker_address import InvalidAddress
    from protocol.errors import ProtocolError

    return (
        CommandFailed,
        CredentialError,
        EnrolmentFailed,
        InvalidAddress,
        InvalidConfiguration,
        InvalidFields,
        InvalidPolicy,
        PredictionFailed,
        ProtocolError,
        ReportError,
        StorageError,
        TrainingError,
    )


def main(arguments: Sequence[str] | None = None) -> Any:
    """The console script `covey-edge`; returns the exit code."""
    options = cli.parser().parse_args(arguments)
    memory.settle()
    os.umask(0o077)
    try:
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        cli.fail(text)
        return _exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
