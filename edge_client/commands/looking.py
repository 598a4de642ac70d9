"""`status`, `privacy` and `doctor`: how a device is, and what it gave."""

from __future__ import annotations

import argparse
import os
import time

from edge_client import cli
from edge_client.commands.settings import configuration_of, example_source
from edge_client.commands.state_lock import is_running


def status(options: argparse.Namespace) -> None:
    """Shows how the device is."""
    from edge_client import report

    status = report.status(options.state, running=is_running(options.state))
    cli.say(cli.as_json(status) if options.json else report.status_text(status))


def privacy(options: argparse.Namespace) -> None:
    """Shows what the device gave, and what it cost."""
    from edge_client import report

    ledger = report.privacy(options.state, int(time.time()))
    cli.say(cli.as_json(ledger) if options.json else report.privacy_text(ledger))


def doctor(options: argparse.Namespace) -> None:
    """Examines whether the device could take part now."""
    from edge_client import doctor
    from edge_client.adapters.checks import Subject, examine
    from edge_client.configuration import InvalidConfiguration
    from edge_client.doctor import Finding

    findings: list[Finding] = []
    data = None
    try:
        data = example_source(options) if options.data or configuration_of(options).data else None
    except (cli.CommandFailed, InvalidConfiguration) as error:
        findings.append(Finding("configuration", "failed", str(error), "mend edge.toml: covey-edge config"))
    broker = options.broker or os.environ.get("COVEY_BROKER")
    findings += examine(Subject(options.state, broker, options.insecure, data))
    cli.say(cli.as_json(doctor.as_dict(findings)) if options.json else doctor.text(findings))
    if doctor.worst(findings) == "failed":
        raise cli.CommandFailed("something is wrong, see above")
