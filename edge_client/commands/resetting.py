"""`reset`: what a device is made to forget, and the question before it forgets everything."""

from __future__ import annotations

import argparse
import sys

from edge_client import cli
from edge_client.commands.state_lock import locked


def reset(options: argparse.Namespace) -> None:
    """Forgets what the options name, or everything."""
    from edge_client import report

    named = options.personal or options.local or options.recordings
    if named and (options.keep_identity or options.forget_ledger):
        raise cli.CommandFailed("--keep-identity and --forget-ledger are for a reset of everything", 2)
    if options.model is not None and not (options.personal or options.local):
        raise cli.CommandFailed("--model needs --personal or --local", 2)
    if not named:
        _reset_device(options)
        return
    if options.recordings:
        from edge_client.adapters.resetting import reset_recordings

        lock = locked(options.state)
        names = reset_recordings(options.state)
        lock.release()
        cli.say(f"deleted the recordings of {', '.join(names)}" if names else "there are no recordings")
        return
    if options.local:
        # A client that runs would go on with those that it has read.
        lock = locked(options.state)
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
        raise cli.CommandFailed(f"{state} holds no device", cli.EXIT_NOT_SET_UP)
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
            raise cli.CommandFailed("nobody is there to ask: add --yes", 2)
        if input("type reset to go on: ").strip() != "reset":
            raise cli.CommandFailed("nothing was changed")
    lock = locked(state)
    reset_device(state, keep_identity=options.keep_identity, forget_ledger=options.forget_ledger)
    lock.release()
    cli.say("done; a memory card may keep copies of what was deleted where only a laboratory finds them")
