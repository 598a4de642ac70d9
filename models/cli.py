"""`covey model export | new | inspect | evaluate`: what a model's author does.

Imported with the rest of `covey`, so TensorFlow is imported only inside the commands that need it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pydantic import TypeAdapter, ValidationError

from models import inspection, template
from models.examples import Examples, InvalidExamples
from models.graph import InvalidGraph
from models.manifest import InvalidManifest
from protocol.fields import Slug

REFUSED = 1
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Refused(Exception):
    """What was asked for cannot be done; says what to do instead."""


def register(app: typer.Typer) -> None:
    """Add the commands to `covey model`."""
    app.command("new")(new)
    app.command("export")(export)
    app.command("inspect")(inspect)
    app.command("evaluate")(evaluate)


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        typer.echo(f"covey: {where + ': ' if where else ''}{first['msg']}", err=True)
        raise typer.Exit(REFUSED) from error
    except (Refused, InvalidExamples, InvalidGraph, InvalidManifest, OSError, ValueError) as error:
        typer.echo(f"covey: {error}", err=True)
        raise typer.Exit(REFUSED) from error


def new(
    directory: Annotated[Path, typer.Argument(help="Where; its last part names the model.")],
) -> None:
    """Writes a project for a new model: model.py, data.py, plan.sh and test_model.py.

    Example: covey model new barn-doors
    """
    with _readable_errors():
        try:
            name = TypeAdapter(Slug).validate_python(directory.resolve().name)
        except ValidationError:
            raise Refused("name it in lower case, digits and hyphens") from None
        if directory.exists() and any(directory.iterdir()):
            raise Refused(f"{directory} is not empty: choose another name")
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in template.files(name).items():
            (directory / file).write_text(content)
    typer.echo(f"made {directory}: write your model into model.py and your sensor's format into data.py")
    typer.echo(f"next:  cd {directory} && python -m pytest && sh plan.sh")


def export(
    source: Annotated[str, typer.Argument(help="FILE.py:NAME, or the name of one of Covey's own models.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for the files.")],
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Start from this weights file, not from new weights."),
    ] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="Write graphs for prediction alone beside it.")
    ] = False,
    examples: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="NPZ of examples that int8 takes its ranges from."),
    ] = None,
) -> None:
    """Exports a Keras model so that it trains on a device: model.tflite, weights.bin and manifest.json.

    NAME is an Architecture, or a function that returns a Keras model; the file may then have LABELS, SCALING
    (an InputSpec), LOSS, TARGET (a TargetSpec), OPTIMIZER (sgd, momentum or adam), ACCUMULATION,
    TRAIN_BATCH_SIZE, LOCAL_LAYERS (names of layers that stay on each device) and EXAMPLE_GRADIENTS. Every
    gradient is proved against TensorFlow's; else nothing is written.

    Example: covey model export my_model.py:build --out export --inference --examples some.npz
    """
    _need_tensorflow()
    with _readable_errors():
        from models.architectures.source import load_architecture
        from models.export import ExportedModel
        from models.inference import PRECISIONS, convert, file_name, scaled_inputs
        from models.manifest import describe
        from models.network import Network
        from models.weights import encode_weights

        architecture = load_architecture(source)
        model = architecture.build_seeded()
        some = Examples.load(examples) if examples else None
        exported = replace(architecture, build=lambda: model).export()
        # Before anything is written.
        scaled = None if some is None else scaled_inputs(exported.manifest, some.x)
        if weights is not None:
            size = exported.manifest.weights.size
            if weights.stat().st_size != size:
                raise Refused(f"{weights} has {weights.stat().st_size} bytes, the model's weights {size}")
            given = np.frombuffer(weights.read_bytes(), "<f4").astype(np.float32)
            manifest = exported.manifest.model_copy(update={"weights": describe(encode_weights(given))})
            exported = ExportedModel(manifest, exported.graph, given)
        exported.write(out)
        manifest = exported.manifest
        typer.echo(f"{manifest.name}: {manifest.parameter_count:,} parameters -> {out}")
        typer.echo(f"  model.tflite            {len(exported.graph):12,} bytes, gradients proved")
        if not inference:
            return
        network = Network(model, architecture.local_layers)
        start = network.flat_weights()[network.shared_count :]
        values = np.concatenate([exported.weights, start])
        for precision in PRECISIONS:
            if precision == "int8" and scaled is None:
                typer.echo("  no int8: it takes its ranges from --examples")
                continue
            content = convert(network, values, precision, scaled)
            (out / file_name(precision)).write_bytes(content)
            typer.echo(f"  {file_name(precision):24}{len(content):12,} bytes")


def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="A model's directory, or a .tflite file.")],
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time a step of training here.")] = True,
) -> None:
    """Shows layers, entry points, operators, sizes, memory and the time of a training step here.

    Example: covey model inspect models/zoo/watch
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _readable_errors():
        manifest, graph, weights = inspection.files_of(path)
        for line in inspection.describe_manifest(manifest) if manifest else ():
            typer.echo(line)
        for line in inspection.describe_graph(graph):
            typer.echo(line)
        if manifest and weights is not None:
            inspection.check_files(manifest, graph, weights)
        if timed and manifest and weights and importlib.util.find_spec("tensorflow"):
            seconds = inspection.time_step(manifest, graph, weights)
            typer.echo(
                f"step        {1e3 * seconds:.2f} ms here, one thread, {manifest.train_batch_size} examples"
            )


def evaluate(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A model's directory.")],
    examples: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="NPZ of x and y, raw as the device has them.")
    ],
    json: Json = False,
) -> None:
    """Compares the trainable model and its inference files on labelled examples.

    Example: covey model evaluate export --examples held_out.npz
    """
    _need_tensorflow()
    with _readable_errors():
        from models import inference

        manifest, graph, weights_file = inspection.files_of(directory)
        if manifest is None or weights_file is None:
            lacking = "manifest.json" if manifest is None else "weights.bin"
            raise Refused(f"{directory} has no {lacking}: export the model again")
        # The runtime would die of a damaged file, or tell the accuracy of other weights.
        inspection.check_files(manifest, graph, weights_file)
        scores = list(inference.evaluate(directory, manifest, Examples.load(examples)))
    if json:
        typer.echo(dumps([asdict(score) for score in scores]))
        return
    typer.echo(f"{'graph':10} {'bytes':>12} {'loss':>9} {'accuracy':>9} {'lost':>9}")
    for score in scores:
        lost = scores[0].accuracy - score.accuracy
        typer.echo(f"{score.graph:10} {score.size:12,} {score.loss:9.4f} {score.accuracy:9.2%} {lost:+9.2%}")


def _need_tensorflow() -> None:
    # Before TensorFlow starts: its notes on the machine are no part of an answer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("tensorflow") is None:
        typer.echo("covey: this needs TensorFlow: pip install 'covey[models]' (Python 3.11)", err=True)
        raise typer.Exit(REFUSED)
