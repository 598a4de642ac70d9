"""Finds a model by its name among Covey's own, or as a function in a file. Needs TensorFlow."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.architectures import ARCHITECTURES
from models.architectures.architecture import Architecture
from models.manifest import InputSpec, LossName
from models.network import check_form


class NoSuchModel(ValueError):
    """No model is where it was said to be; says what to give instead."""


def load_architecture(source: str) -> Architecture:
    """The architecture that FILE.py:NAME, or the name of one of Covey's own, stands for.

    NAME is an `Architecture`, or a function that returns one or a Keras model; the file may then have LABELS,
    SCALING (an `InputSpec`), LOSS, TARGET (a `TargetSpec`), OPTIMIZER, ACCUMULATION, TRAIN_BATCH_SIZE,
    LOCAL_LAYERS and EXAMPLE_GRADIENTS: see `Architecture`.

    Raises:
        NoSuchModel: there is no such file, it fails, there is nothing of that name in it, or what is there is
            of another type.
        UnsupportedModel: the model as a whole cannot be exported.
    """
    file, colon, name = source.rpartition(":")
    if not colon:
        if source not in ARCHITECTURES:
            raise NoSuchModel(
                f"no model {source}: give FILE.py:NAME, or one of {', '.join(sorted(ARCHITECTURES))}"
            )
        return ARCHITECTURES[source]
    path = Path(file)
    module = _module(path)
    found = getattr(module, name, None)
    if isinstance(found, Architecture):
        return found
    if not callable(found):
        raise NoSuchModel(f"{file} has no Architecture and no function {name}")
    with _own_errors(path):
        model = found()
    if isinstance(model, Architecture):
        return model
    check_form(model)
    outputs, shape = int(model.output_shape[-1]), tuple(model.input_shape[1:])
    loss: LossName = getattr(module, "LOSS", "sparse_categorical_crossentropy")
    count = 2 if loss == "binary_crossentropy" else outputs
    plain = InputSpec(shape=shape, mean=(0.0,) * shape[-1], std=(1.0,) * shape[-1])
    scaling = getattr(module, "SCALING", plain)
    if not isinstance(scaling, InputSpec):
        raise NoSuchModel(f"SCALING in {file} is no InputSpec: write InputSpec(shape=..., mean=..., std=...)")
    return Architecture(
        name=re.sub("[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "model",
        build=found,
        labels=_names(module, "LABELS", [f"class {index}" for index in range(count)]),
        scaling=scaling,
        loss=loss,
        target=getattr(module, "TARGET", None),
        optimizer=getattr(module, "OPTIMIZER", "sgd"),
        accumulation=getattr(module, "ACCUMULATION", 1),
        train_batch_size=getattr(module, "TRAIN_BATCH_SIZE", 32),
        local_layers=_names(module, "LOCAL_LAYERS", ()),
        example_gradients=getattr(module, "EXAMPLE_GRADIENTS", False),
    )


def _names(module: Any, name: str, default: Sequence[str]) -> tuple[str, ...]:
    """A constant of the caller's file that lists names."""
    found = getattr(module, name, default)
    if isinstance(found, str):
        raise NoSuchModel(f'{name} is one text: write ("{found}",) for a single name')
    return tuple(found)


def _module(path: Path) -> Any:
    """Run a Python file of the caller's own, as a module."""
    if not path.is_file():
        raise NoSuchModel(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise NoSuchModel(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Its neighbours can be imported, as when Python runs it.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _own_errors(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@contextmanager
def _own_errors(path: Path) -> Iterator[None]:
    """Say where in the caller's file it failed."""
    try:
        yield
    except Exception as error:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == str(path)]
        where = f"line {lines[-1]}: " if lines else ""
        raise NoSuchModel(f"{path} fails, {where}{type(error).__name__}: {error}") from error
