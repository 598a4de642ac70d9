"""How fast, in how little memory, and how well do Covey's models train?

    python benchmarks/training.py [--json FILE]           one step of each model, beside TensorFlow
    python benchmarks/training.py --folds [--json FILE]   the watch recipe, leaving out every person in turn

A step is measured in the device's runtime and, where TensorFlow is installed, as a compiled `tf.function` of
the same Keras model with the same batch; each in a process of its own, with one thread and with all cores.

The folds are simulated in one process without a network: every device's update is clipped and the plain mean
is applied. Local and central training get the same number of epochs, rounds times local epochs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import zoo
from models.datasets import watch
from models.manifest import ModelManifest
from models.recipes import WATCH, Recipe
from models.weights import decode_weights
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
    step_over_tf: float | None = None
    step_over_torch: float | None = None


@dataclass(frozen=True)
class FoldResult:
    """Accuracy on one left-out person, and seconds of processor time that the federated training took."""

    person: str
    local: float
    federated: float
    central: float
    federated_cpu_s: float


def noise(manifest: ModelManifest, count: int) -> Examples:
    """Random examples of the right form."""
    random = np.random.default_rng(0)
    x = random.standard_normal((count, *manifest.input.shape), dtype=np.float32)
    if manifest.target.dtype == "int32":
        return Examples("noise", x, random.integers(0, len(manifest.labels), count).astype(np.int32))
    return Examples("noise", x, random.standard_normal((count, len(manifest.labels)), dtype=np.float32))


def export_to(case: tuple[str, Path]) -> None:
    """Export a model that is not bundled; in a process of its own, for TensorFlow's memory."""
    from models.architectures import ARCHITECTURES

    ARCHITECTURES[case[0]].export().write(case[1])


def peak_rss() -> int:
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def measure_step(case: tuple[Path, int]) -> StepResult:
    """Time training in this process; call it in a fresh one for the memory to mean anything."""
    directory, threads = case
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    graph = (directory / "model.tflite").read_bytes()
    weights = decode_weights((directory / "weights.bin").read_bytes(), manifest)
    trainer = TfliteTrainer(manifest, graph, threads=threads)
    examples, random = noise(manifest, STEPS * manifest.train_batch_size), np.random.default_rng(0)
    epochs = {}
    for number in (1, 2):
        config = TrainingConfig(local_epochs=number, learning_rate=1e-5)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            trainer.train(weights, examples, config, random)
            times.append(time.perf_counter() - start)
        epochs[number] = min(times)
    return StepResult(
        model=manifest.name,
        runtime=trainer.runtime,
        threads=threads,
        batch=manifest.train_batch_size,
        parameters=manifest.parameter_count,
        graph_bytes=len(graph),
        # The difference leaves out the evaluations before and after.
        step_s=(epochs[2] - epochs[1]) / STEPS,
        peak_rss_bytes=peak_rss(),
    )


def measure_tensorflow(case: tuple[Path, int]) -> StepResult:
    """The same step by TensorFlow: plain gradient descent on the Keras model, compiled into one graph."""
    import tensorflow as tf

    from models.architectures import ARCHITECTURES
    from models.losses import stock_losses

    directory, threads = case
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    model = ARCHITECTURES[manifest.name].build_seeded()
    examples = noise(manifest, manifest.train_batch_size)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(stock_losses(manifest.loss, model(x, training=True), y))
        variables = model.trainable_variables
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(1e-5 * gradient)
        return loss

    x, y = tf.constant(examples.x), tf.constant(examples.y)
    step(x, y)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            step(x, y)
        times.append((time.perf_counter() - start) / STEPS)
    return StepResult(
        manifest.name, "tensorflow", threads, len(y), manifest.parameter_count, 0, min(times), peak_rss()
    )


def measure_steps(names: list[str]) -> list[StepResult]:
    """Every model in the device's runtime and, where it is installed, in TensorFlow."""
    results = []
    known = importlib.util.find_spec("tensorflow") is not None
    bundled = Path(str(zoo.__file__)).parent
    # A process for each measurement, so that one's memory does not count for the next.
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with pool, tempfile.TemporaryDirectory() as made:
        for name in names:
            directory = bundled / name if name in zoo.NAMES else Path(made) / name
            if name not in zoo.NAMES:
                pool.apply(export_to, ((name, directory),))
            for threads in sorted({1, os.cpu_count() or 1}):
                own = pool.apply(measure_step, ((directory, threads),))
                if known:
                    other = pool.apply(measure_tensorflow, ((directory, threads),))
                    results += [replace(own, step_over_tf=own.step_s / other.step_s), other]
                    print_step(results[-2])
                else:
                    results.append(own)
                print_step(results[-1])
    return results


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
    over = f"  {result.step_over_tf:5.2f} x TensorFlow" if result.step_over_tf else ""
    print(
        f"{result.model:9} {result.runtime:15} {result.threads} threads  "
        f"{1e3 * result.step_s:8.3f} ms a step of {result.batch:2}  "
        f"{result.peak_rss_bytes / 2**20:6.1f} MiB at the peak{over}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", action="store_true", help="run the watch recipe instead of timing steps")
    parser.add_argument("--models", nargs="+", help="which ones; by default those that are bundled")
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
        results = measure_steps(options.models or list(zoo.NAMES))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
