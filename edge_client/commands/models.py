"""`predict` and `personalise`: what the device's models are for."""

from __future__ import annotations

import argparse
import contextlib

from edge_client import cli


def predict(options: argparse.Namespace) -> None:
    """Answers for the rows of a file, with a model of this device."""
    from edge_client import report
    from edge_client.adapters.uses import VersionUses
    from edge_client.local import Predictor, SocketPredictor

    if options.repeat < 1:
        raise cli.CommandFailed("--repeat is at least 1", 2)
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


def personalise(options: argparse.Namespace) -> None:
    """Fits a personal model to this device's examples, and keeps it when it is better."""
    from edge_client import report
    from edge_client.adapters.worker import tflite_trainer
    from edge_client.commands.settings import example_source
    from edge_client.personalisation import PersonalConfig

    try:
        config = PersonalConfig(options.epochs, options.learning_rate, gap=options.gap)
    except ValueError as error:
        raise cli.CommandFailed(str(error)) from error
    answer = report.personalise(options.state, example_source(options), options.model, config, tflite_trainer)
    cli.say(cli.as_json(answer) if options.json else report.personal_text(answer))
