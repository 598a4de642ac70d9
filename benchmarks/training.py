"""How fast, in how little memory, and how well do the bundled models train?

    python benchmarks/training.py [--json FILE]           one step of each model, each in its own process
    python benchmarks/training.py --folds [--json FILE]   the watch recipe, leaving out every person in turn

The folds are simulated in one process without a network: every device's update is clipped and the plain mean
is applied. Local and central training get the same number of epochs, rounds times local epochs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import zoo
from models.datasets import watch
from models.recipes import WATCH, Recipe
from protocol.dp.clipping import clip

Weights = NDArray[np.float32]
STEPS = 50
REPEATS = 5


@dataclass(frozen=True)
class StepResult:
    """One model in one runtime: seconds a step (best of five runs) and peak resident bytes of the process."""

    model: str
    runtime: str
    threads: int
    batch: int
    parameters: int
    graph_bytes: int
    step_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class FoldResult:
    """Accuracy on one left-out person, and seconds of processor time that the federated training took."""

    person: str
    local: float
    federated: float
    central: float
    federated_cpu_s: float


def measure_step(name: str) -> StepResult:
    """Time training in this process; call it in a fresh one for the memory to mean anything."""
    model = zoo.load(name)
    manifest = model.manifest
    trainer = TfliteTrainer(manifest, model.graph)
    random = np.random.default_rng(0)
    count = STEPS * manifest.train_batch_size
    x = random.standard_normal((count, *manifest.input.shape), dtype=np.float32)
    examples = Examples("noise", x, random.integers(0, len(manifest.labels), count).astype(np.int32))
    epochs = {}
    for number in (1, 2):
        config = TrainingConfig(local_epochs=number, learning_rate=1e-4)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            trainer.train(model.weights, examples, config, random)
            times.append(time.perf_counter() - start)
        epochs[number] = min(times)
    status = Path("/proc/self/status").read_text().split()
    return StepResult(
        model=name,
        runtime=trainer.runtime,
        threads=1,
        batch=manifest.train_batch_size,
        parameters=manifest.parameter_count,
        graph_bytes=len(model.graph),
        # The difference leaves out the evaluations before and after.
        step_s=(epochs[2] - epochs[1]) / STEPS,
        peak_rss_bytes=1024 * int(status[status.index("VmHWM:") + 1]),
    )


def measure_folds(recipe: Recipe) -> list[FoldResult]:
    """Run the recipe with every person left out in turn."""
    model = zoo.load("watch")
    trainer = TfliteTrainer(model.manifest, model.graph)
    people = watch.load()
    results = []
    for index, test in enumerate(people):
        devices = [person for person in people if person is not test]
        random = np.random.default_rng(index)
        start = time.process_time()
        weights = federate(trainer, model.weights, devices, recipe, random)
        seconds = time.process_time() - start
        alone = [train_alone(trainer, model.weights, device, recipe, random) for device in devices]
        central = train_alone(trainer, model.weights, Examples.pooled("all", devices), recipe, random)
        results.append(
            FoldResult(
                person=test.name,
                local=float(np.mean([trainer.evaluate(one, test).accuracy for one in alone])),
                federated=trainer.evaluate(weights, test).accuracy,
                central=trainer.evaluate(central, test).accuracy,
                federated_cpu_s=seconds,
            )
        )
        print_fold(results[-1])
    return results


def federate(
    trainer: TfliteTrainer,
    weights: Weights,
    devices: list[Examples],
    recipe: Recipe,
    random: np.random.Generator,
) -> Weights:
    """All rounds of a federated run: the plain mean of clipped updates."""
    config = TrainingConfig(recipe.local_epochs, recipe.learning_rate, recipe.proximal_mu)
    for _ in range(recipe.rounds):
        updates = [trainer.train(weights, device, config, random).delta for device in devices]
        weights = weights + np.mean([clip(update, recipe.clip_norm) for update in updates], axis=0)
    return weights


def train_alone(
    trainer: TfliteTrainer, weights: Weights, examples: Examples, recipe: Recipe, random: np.random.Generator
) -> Weights:
    """As many epochs as a federated run has, on one set of examples."""
    config = TrainingConfig(recipe.rounds * recipe.local_epochs, recipe.learning_rate)
    return weights + trainer.train(weights, examples, config, random).delta


def print_fold(result: FoldResult) -> None:
    print(
        f"{result.person:10} local {result.local:.3f}  federated {result.federated:.3f}  "
        f"central {result.central:.3f}  {result.federated_cpu_s:5.1f} s",
        flush=True,
    )


def print_step(result: StepResult) -> None:
    print(
        f"{result.model:8} {result.runtime:15} {result.parameters:7,} parameters  "
        f"{1e3 * result.step_s:6.3f} ms a step of {result.batch}  "
        f"{result.peak_rss_bytes / 2**20:5.1f} MiB at the peak  graph {result.graph_bytes:,} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", action="store_true", help="run the watch recipe instead of timing steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    results: list[StepResult] | list[FoldResult]
    if options.folds:
        results = measure_folds(WATCH)
        means = {
            name: float(np.mean([getattr(result, name) for result in results]))
            for name in ("local", "federated", "central", "federated_cpu_s")
        }
        print_fold(FoldResult("mean", **means))
    else:
        # A process for each model, so that one's memory does not count for the next.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            results = pool.map(measure_step, zoo.NAMES, chunksize=1)
        for result in results:
            print_step(result)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
