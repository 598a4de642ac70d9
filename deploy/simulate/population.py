"""The simulated devices: whose examples each holds, and who is held out. Pure but for reading files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.simulate.options import SimulationError
from edge_client.scoring import scaled_targets
from edge_client.training import ExamplesRejected
from models.datasets import digits, watch
from models.datasets.source import DataSetUnavailable
from models.examples import Examples, InvalidExamples
from models.manifest import ModelManifest

BUNDLED: dict[str, Callable[[], list[Examples]]] = {"watch": watch.load, "digits": digits.load}


@dataclass(frozen=True)
class Population:
    """Who trains and who tests.

    Attributes:
        name: of the data.
        devices: examples of each simulated device.
        held_out: of whom no example is on any device.
    """

    name: str
    devices: tuple[Examples, ...]
    held_out: tuple[Examples, ...]


def populate(
    data: str, manifest: ModelManifest, *, devices: int | None, held_out: int, seed: int
) -> Population:
    """Reads the data, holds people out, and gives the others' examples to devices.

    With no more devices than people, each holds one person's examples. With more, a person's examples are
    dealt to several devices, none twice: it is people that are held out, never examples.

    Args:
        data: `watch`, `digits` or a directory.
        manifest: of the model, which the examples have to fit.
        devices: how many; one for each person by default.
        held_out: how many people test.
        seed: deals the examples.

    Raises:
        SimulationError: there is no such data, it does not fit the model, or there are too few people.
    """
    people = _read(data)
    for person in people:
        _check(person, manifest)
    if len(people) - held_out < 1 or held_out < 1:
        raise SimulationError(f"{data} has {len(people)} people or devices: hold out fewer than {held_out}")
    training = people[held_out:]
    count = len(training) if devices is None else devices
    if count < 2:
        raise SimulationError(f"a population has at least 2 devices, not {count}")
    return Population(
        name=data if data in BUNDLED else Path(data).resolve().name,
        devices=tuple(_deal(training, count, np.random.default_rng([seed, 0]))),
        held_out=tuple(people[:held_out]),
    )


def _read(data: str) -> list[Examples]:
    try:
        if data in BUNDLED:
            return BUNDLED[data]()
        files = sorted(Path(data).glob("*.npz"))
        if not files:
            raise SimulationError(
                f"{data} is neither {' nor '.join(BUNDLED)}, nor a directory with an NPZ file for each device"
            )
        return [Examples.load(path) for path in files]
    except (InvalidExamples, DataSetUnavailable) as error:
        raise SimulationError(str(error)) from error


def _check(person: Examples, manifest: ModelManifest) -> None:
    if person.x.shape[1:] != manifest.input.shape or not len(person):
        raise SimulationError(
            f"{person.name} has {len(person)} examples of shape {person.x.shape[1:]}; the model "
            f"{manifest.name} takes {manifest.input.shape}"
        )
    try:
        scaled_targets(manifest, person.y)
    except ExamplesRejected as error:
        raise SimulationError(f"{person.name}: {error}") from error


def _deal(people: Sequence[Examples], count: int, generator: np.random.Generator) -> list[Examples]:
    if count <= len(people):
        chosen = sorted(generator.permutation(len(people))[:count])
        return [people[index] for index in chosen]
    dealt = []
    for index, person in enumerate(people):
        parts = count // len(people) + (index < count % len(people))
        if parts > len(person):
            raise SimulationError(
                f"{person.name} has {len(person)} examples, too few for {parts} devices: simulate fewer"
            )
        order = np.array_split(generator.permutation(len(person)), parts)
        dealt += [
            Examples(f"{person.name}-{number:04d}", person.x[chosen], person.y[chosen])
            for number, chosen in enumerate(order, start=1)
        ]
    return dealt
