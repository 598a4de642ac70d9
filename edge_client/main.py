"""The composition root of the device: `covey-edge`.

Imports are inside the functions, so that `--help` is quick and a process holds in memory only what its
command needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_client import cli
from edge_client.adapters import memory

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_COMMANDS = {
    "init": "joining",
    "enroll": "joining",
    "run": "running",
    "renew": "joining",
    "status": "looking",
    "predict": "models",
    "personalise": "models",
    "reset": "resetting",
    "privacy": "looking",
    "config": "settings",
    "doctor": "looking",
    "fields": "settings",
    "policy": "settings",
}
"""The module of `edge_client.commands` that has a command, as a function of the same name."""


def _body(command: str) -> Callable[[argparse.Namespace], None]:
    """What a command does; its module is imported now."""
    body: Callable[[argparse.Namespace], None] = getattr(
        import_module(f"edge_client.commands.{_COMMANDS[command]}"), command
    )
    return body


def _exit_code(error: Exception) -> int:
    from edge_client.adapters.credentials import CredentialError
    from edge_client.enrolling import TicketRefused
    from edge_client.prediction import NoModel

    if isinstance(error, cli.CommandFailed):
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
        cli.CommandFailed,
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
        _body(options.command)(options)
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
