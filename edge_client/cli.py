"""The command line of the device: what can be typed, and how answers look. No work is done here."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

EXIT_FAILED = 1
EXIT_NOT_SET_UP = 3
EXIT_RUNNING = 4
EXIT_NO_MODEL = 5
EXIT_REFUSED = 6

_EXAMPLES = """\
examples:
  covey-edge enroll --state /var/lib/covey --ticket barn-1.ticket
  covey-edge run --state /var/lib/covey --data /srv/recordings
  covey-edge predict --state /var/lib/covey --input window.npy --json
  covey-edge personalise --state /var/lib/covey --data /srv/recordings

exit codes: 0 done, 1 failed, 2 wrong usage, 3 not initialised or not enrolled,
            4 another instance runs on this state directory, 5 no model to predict with yet,
            6 the ticket lets nobody in, however often it is shown
"""


class CommandFailed(Exception):
    """A command cannot do its work; the message says what to do.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.code = code


def parser() -> argparse.ArgumentParser:
    """The parser of `covey-edge`."""
    top = argparse.ArgumentParser(
        prog="covey-edge",
        description="The device side of Covey: learns from local data that never leaves this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    init = _command(
        commands,
        "init",
        "make this device's key and its signing request",
        "covey-edge init --state /var/lib/covey --device-id barn-1",
    )
    init.add_argument("--device-id", required=True, help="name in the fleet: lower case, digits, hyphens")

    enroll = _command(
        commands,
        "enroll",
        "join a fleet by a ticket of its operator, or by the bundle that they made of the request",
        "covey-edge enroll --state /var/lib/covey --ticket barn-1.ticket\n"
        "  covey-edge enroll --state /var/lib/covey --ticket - --retry < barn-1.ticket\n"
        "  covey-edge enroll --state /var/lib/covey --bundle barn-1.json",
    )
    way = enroll.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--ticket",
        metavar="FILE",
        help="a ticket of `covey device token`, - for standard input; the file is overwritten and removed",
    )
    way.add_argument("--bundle", type=Path, metavar="FILE", help="enrolment bundle, JSON")
    enroll.add_argument(
        "--retry", action="store_true", help="with --ticket: come again until the service has answered"
    )

    _add_run(commands)

    renew = _command(
        commands,
        "renew",
        "have the client that runs renew this device's certificate now, which it does by itself in good time",
        "covey-edge renew --state /var/lib/covey --new-key",
    )
    renew.add_argument("--new-key", action="store_true", help="with a new key, in place of the present one")
    renew.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait (default: %(default)s)"
    )

    status = _command(
        commands,
        "status",
        "say what this device has and does",
        "covey-edge status --state /var/lib/covey --json",
    )
    status.add_argument("--json", action="store_true", help="print JSON")

    predict = _command(
        commands,
        "predict",
        "answer with the last good version of a model; works while `run` runs",
        "covey-edge predict --state /var/lib/covey --input window.npy --json",
    )
    predict.add_argument(
        "--input", type=Path, required=True, metavar="FILE.npy", help="one example or an array of them, raw"
    )
    predict.add_argument("--model", help="which model, when this device has several")
    predict.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="ask the client that runs, at its socket (default: read the state directory)",
    )
    predict.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="ask N times more, and say how long an answer takes",
    )
    predict.add_argument("--json", action="store_true", help="print JSON")

    _add_personalise(commands)

    privacy = _command(
        commands,
        "privacy",
        "show this device's ledger: what it contributed, and how it was protected",
        "covey-edge privacy --state /var/lib/covey",
    )
    privacy.add_argument("--json", action="store_true", help="print JSON")

    _add_fields(commands)

    doctor = _command(
        commands,
        "doctor",
        "look for the usual troubles, and say what to do",
        "covey-edge doctor --state /var/lib/covey",
    )
    doctor.add_argument("--broker", metavar="URL", help="as for run (default: as the enrolment said)")
    doctor.add_argument("--insecure", action="store_true", help="as for run")
    doctor.add_argument("--data", type=Path, metavar="DIR", help="as for run")
    _add_config(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")

    config = _command(
        commands,
        "config",
        "print the owner's settings as they hold: what edge.toml says, and the defaults",
        "covey-edge config --state /var/lib/covey",
    )
    _add_config(config)
    config.add_argument("--json", action="store_true", help="print JSON")

    policy = _command(
        commands,
        "policy",
        "show what this device agrees to, or set it",
        "covey-edge policy --state /var/lib/covey --file strict.json",
    )
    policy.add_argument("--file", type=Path, help="install this policy; fields that it omits keep defaults")
    return top


def _add_personalise(commands: Any) -> None:
    personalise = _command(
        commands,
        "personalise",
        "fine-tune the last good version on this device's own data, and keep it if it is better",
        "covey-edge personalise --state /var/lib/covey --data /srv/recordings --epochs 20",
    )
    personalise.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="NPZ files in the order of time, as for run; not used where edge.toml has [[data]]",
    )
    _add_config(personalise)
    personalise.add_argument("--model", help="which model, when this device has several")
    personalise.add_argument("--epochs", type=int, default=20, help="passes (default: %(default)s)")
    personalise.add_argument(
        "--learning-rate", type=float, default=0.1, help="of the model's optimizer (default: %(default)s)"
    )
    personalise.add_argument(
        "--gap",
        type=int,
        default=1,
        metavar="N",
        help="examples left out between those trained on and the later ones that judge: as many as overlap "
        "(default: %(default)s)",
    )
    personalise.add_argument("--json", action="store_true", help="print JSON")

    reset = _command(
        commands,
        "reset",
        "forget: everything but the ledger and the owner's rules, or only what is named",
        "covey-edge reset --state /var/lib/covey --keep-identity\n"
        "  covey-edge reset --state /var/lib/covey --personal\n"
        "  covey-edge reset --state /var/lib/covey --local --model watch",
    )
    what = reset.add_mutually_exclusive_group()
    what.add_argument(
        "--personal", action="store_true", help="what personalise made: the global version answers again"
    )
    what.add_argument(
        "--local",
        action="store_true",
        help="local layers: they start anew, as on a new device; only while the client is stopped",
    )
    what.add_argument(
        "--recordings",
        action="store_true",
        help="what the sources in edge.toml recorded; only while the client is stopped",
    )
    reset.add_argument("--model", help="with --personal or --local: of this model only")
    reset.add_argument(
        "--keep-identity", action="store_true", help="everything, but the device stays in its fleet"
    )
    reset.add_argument(
        "--forget-ledger",
        action="store_true",
        help="everything, and the privacy ledger, too: for a device that other people's data will be on",
    )
    reset.add_argument("--yes", action="store_true", help="do not ask before everything goes")


def _add_fields(commands: Any) -> None:
    fields = _command(
        commands,
        "fields",
        "list what queries may ask this device for and what it would answer, or set it",
        "covey-edge fields --state /var/lib/covey --data /srv/recordings\n"
        "  covey-edge fields set battery-temperature --state /var/lib/covey"
        " --file /sys/class/thermal/thermal_zone0/temp --scale 0.001\n"
        "  covey-edge fields set recording-length --state /var/lib/covey"
        " --recordings --scale 2.5 --summary mean\n"
        "  covey-edge fields remove recording-length --state /var/lib/covey",
    )
    fields.add_argument(
        "action", nargs="?", choices=("list", "set", "remove"), default="list", help="default: list"
    )
    fields.add_argument("name", nargs="?", metavar="NAME", help="of the field: lower case, digits, hyphens")
    source = fields.add_mutually_exclusive_group()
    source.add_argument("--value", type=float, metavar="X", help="set: this number")
    source.add_argument("--file", type=Path, metavar="FILE", help="set: the numbers in a text file")
    source.add_argument(
        "--recordings", action="store_true", help="set: the examples in each NPZ file of --data of `run`"
    )
    fields.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="set: what a reading is multiplied by"
    )
    fields.add_argument(
        "--summary",
        choices=("last", "mean", "median", "min", "max", "sum"),
        help="set: how several readings become one (default: last of a file, sum of recordings)",
    )
    fields.add_argument("--data", type=Path, metavar="DIR", help="list: what `run` gets as --data")
    fields.add_argument("--json", action="store_true", help="print JSON")


def _add_run(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        "take part in rounds until SIGTERM or Ctrl-C",
        "covey-edge run --state /var/lib/covey --data /srv/recordings",
    )
    run.add_argument(
        "--broker",
        metavar="URL",
        help="mqtts://HOST[:PORT], or mqtt:// locally (default: COVEY_BROKER, else as the enrolment said)",
    )
    run.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="NPZ files with x (float32) and y (int32); not used where edge.toml has [[data]]",
    )
    _add_config(run)
    run.add_argument(
        "--model", action="append", metavar="NAME", help="follow this model only; may be repeated"
    )
    run.add_argument(
        "--max-download-rate",
        type=byte_rate,
        metavar="RATE",
        help="bytes of models a second, on average, such as 200k or 1.5M (default: no limit)",
    )
    run.add_argument("--policy", type=Path, metavar="FILE", help="policy (default: policy.json in the state)")
    run.add_argument(
        "--mqtt-version",
        choices=("auto", "5", "3.1.1"),
        default="auto",
        help="auto tries 5, then 3.1.1 (default: %(default)s)",
    )
    run.add_argument(
        "--priority",
        choices=("background", "normal"),
        default="background",
        help="background gives way to all other programs, normal changes nothing (default: %(default)s)",
    )
    run.add_argument("--insecure", action="store_true", help="allow mqtt:// to another machine, in the clear")
    run.add_argument("--ca", type=Path, metavar="PEM", help="CA of the broker (default: the fleet's)")
    run.add_argument("--cert", type=Path, metavar="PEM", help="TLS certificate (default: the device's own)")
    run.add_argument("--key", type=Path, metavar="PEM", help="its key (default: the device's own)")
    run.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what goes to standard error (default: %(default)s)",
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="the owner's settings (default: edge.toml in the state)"
    )


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--state", type=Path, required=True, metavar="DIR", help="this device's state directory"
    )
    return command


def byte_rate(text: str) -> float:
    """Bytes a second from a number, with k for 10^3 or M for 10^6."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M") else (text, "")
    try:
        rate = float(number) * {"": 1.0, "k": 1e3, "M": 1e6}[unit]
    except ValueError:
        rate = math.nan
    if not 1 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: say bytes a second, such as 200k or 1.5M")
    return rate


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line of the answer."""
    (stream or sys.stdout).write(f"{line}\n")


def fail(message: str) -> None:
    """Prints why a command failed."""
    say(f"covey-edge: {message}", sys.stderr)


def as_json(value: Mapping[str, Any]) -> str:
    """An answer as JSON."""
    return json.dumps(value, indent=2, allow_nan=False)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under headings, in columns as wide as they need."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, ["-" * width for width in widths], *rows)
    )
    return "\n".join(lines)
