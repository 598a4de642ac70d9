"""`init`, `enroll` and `renew`: how a device joins a fleet, and stays in it."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from edge_client import cli
from edge_client.commands.state_lock import is_running
from edge_client.device_setup import enrol, enrol_by_ticket, initialise

_CLOCK_SECONDS = 3_600.0
"""A clock that is off by more finds certificates not valid yet, or any more."""


def init(options: argparse.Namespace) -> None:
    """Makes the device's key, and the request for its certificate."""
    from edge_client.adapters.credentials import REQUEST

    initialise(options.state, options.device_id)
    cli.say(f"key and signing request of {options.device_id} are in {options.state}")
    cli.say(f"next: have {options.state / REQUEST} signed by the fleet's operator, then")
    cli.say(f"      covey-edge enroll --state {options.state} --bundle FILE")


def enroll(options: argparse.Namespace) -> None:
    """Takes a bundle over, or shows a ticket, until the device is enrolled."""
    from protocol.enrolment import EnrolmentBundle

    if options.ticket is not None:
        _enroll_by_ticket(options)
        return
    try:
        bundle = EnrolmentBundle.from_bytes(options.bundle.read_bytes())
    except OSError as error:
        raise cli.CommandFailed(f"cannot read {options.bundle}: {error.strerror}") from error
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
        raise cli.CommandFailed(f"cannot read {options.ticket}: {error}") from error
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


def renew(options: argparse.Namespace) -> None:
    """Has the running client ask for a new certificate, and waits for the answer."""
    from edge_client.adapters.credentials import load_credentials
    from edge_client.adapters.renewal_files import RenewalFiles

    load_credentials(options.state)
    files = RenewalFiles(options.state)
    files.wish(new_key=options.new_key)
    if not is_running(options.state):
        cli.say("the client does not run: it asks for a new certificate when it is started")
        return
    give_up = time.monotonic() + options.timeout
    while (outcome := files.outcome()) is None:
        if time.monotonic() >= give_up:
            raise cli.CommandFailed("no answer yet: the client goes on asking; its log says more")
        time.sleep(0.2)
    if outcome != "renewed":
        raise cli.CommandFailed(outcome)
    expires = _certificate_end(options.state)
    cli.say(f"renewed: the certificate is good until {expires}")


def _certificate_end(state: Path) -> str:
    from edge_client.adapters.credentials import load_credentials
    from protocol.renewal import Lifetime

    ends = Lifetime.of(load_credentials(state).bundle.certificate).ends
    return time.strftime("%Y-%m-%d", time.gmtime(ends))
