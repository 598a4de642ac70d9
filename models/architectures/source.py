"""Finds a model by its name among Covey's own, or as a function in a file. Needs TensorFlow."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from models.architectures import ARCHITECTURES
from models.architectures.architecture import Architecture
from models.manifest import InputSpec, LossName


class NoSuchModel(ValueError):
    """No model is where it was said to be; says what to give instead."""


def load_architecture(source: str) -> Architecture:
    """The architecture that FILE.py:NAME, or the name of one of Covey's own, stands for.

    NAME is an `Architecture`, or a function that returns one or a Keras model; the file may then have LABELS,
    SCALING (an `InputSpec`), LOSS, TARGET, OPTIMIZER, TRAIN_BATCH_SIZE and LOCAL_LAYERS.

    Raises:
        NoSuchModel: there is no such file, or nothing of that name in it.
    """
    file, colon, name = source.rpartition(":")
    if not colon:
        if source not in ARCHITECTURES:
            raise NoSuchModel(
                f"no model {source}: give FILE.py:NAME, or one of {', '.join(sorted(ARCHITECTURES))}"
            )
        return ARCHITECTURES[source]
    module = _module(Path(file))
    found = getattr(module, name, None)
    if isinstance(found, Architecture):
        return found
    if not callable(found):
        raise NoSuchModel(f"{file} has no Architecture and no function {name}")
    model = found()
    if isinstance(model, Architecture):
        return model
    outputs, shape = int(model.output_shape[-1]), tuple(model.input_shape[1:])
    loss: LossName = getattr(module, "LOSS", "sparse_categorical_crossentropy")
    count = 2 if loss == "binary_crossentropy" else outputs
    plain = InputSpec(shape=shape, mean=(0.0,) * shape[-1], std=(1.0,) * shape[-1])
    return Architecture(
        name=Path(file).stem.lower().replace("_", "-"),
        build=found,
        labels=tuple(getattr(module, "LABELS", [f"class {index}" for index in range(count)])),
        scaling=getattr(module, "SCALING", plain),
        loss=loss,
        target=getattr(module, "TARGET", None),
        optimizer=getattr(module, "OPTIMIZER", "sgd"),
        train_batch_size=getattr(module, "TRAIN_BATCH_SIZE", 32),
        local_layers=tuple(getattr(module, "LOCAL_LAYERS", ())),
    )


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
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
