"""How fast, in how little memory, and how well do Covey's models train?

    python benchmarks/training.py [--json FILE]           one step of each model, beside its peers
    python benchmarks/training.py --folds [--json FILE]   the watch recipe, leaving out every person in turn

A step is measured in the small runtime of this Python, in that of another one (`make test-313` makes it), as
a compiled `tf.function` of the same Keras model, and in PyTorch (`make bench-torch`): the same batch and
optimizer, each in a process of its own, with one thread and with all cores. Their repetitions take turns, so
that what else the machine does burdens all alike. A step is as long as in the fastest, since a burden
only ever adds. What is not installed is left out.

The folds are simulated in one process without a network: every device's update is clipped and the plain mean
is applied. Local and central training get the same number of epochs, rounds times local epochs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import zoo
from models.datasets import watch
from models.manifest import ModelManifest
from models.recipes import WATCH, Recipe
from protocol.dp.clipping import clip

Weights = NDArray[np.float32]
STEPS = Path(__file__).with_name("training_steps.py")
REPEATS = 15
NAMES = ("watch", "digits", "keywords", "pictures", "anomaly", "forecast", "gestures")


@dataclass(frozen=True)
class StepResult:
    """One model in one runtime: seconds a step (fastest repetition), peak resident bytes of its process."""

    model: str
    runtime: str
    threads: int
    batch: int
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


def export_to(case: tuple[str, Path]) -> None:
    """Export a model; in a process of its own, for TensorFlow's memory."""
    from models.architectures import ARCHITECTURES

    ARCHITECTURES[case[0]].export().write(case[1])


class Peer:
    """One runtime's process for one model."""

    def __init__(self, python: str, runtime: str, directory: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [python, str(STEPS), runtime, str(directory), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self.runtime = self._line()
        self.times: list[float] = []

    def repeat(self) -> None:
        """Measure once more."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.times.append(float(self._line()))

    def finish(self) -> int:
        """Let the process end: its peak memory in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        peak = int(self._line())
        self._process.stdout.close()
        self._process.wait()
        return peak

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended: {self._process.args!r}")
        return line


def measure_steps(names: list[str], pythons: dict[str, list[str]]) -> list[StepResult]:
    """Every model in every runtime, with one thread and with all cores."""
    results = []
    pool = multiprocessing.get_context("spawn").Pool(1)
    with pool, tempfile.TemporaryDirectory() as made:
        for name in names:
            pool.apply(export_to, ((name, Path(made) / name),))
        pool.close()
        for name in names:
            for threads in sorted({1, os.cpu_count() or 1}):
                found = measure_model(Path(made) / name, threads, pythons)
                for result in found:
                    print_step(result)
                results += found
    return results


def measure_model(directory: Path, threads: int, pythons: dict[str, list[str]]) -> list[StepResult]:
    """One model in every runtime, by turns."""
    peers = [Peer(python, kind, directory, threads) for kind, all_ in pythons.items() for python in all_]
    for _ in range(REPEATS):
        for peer in peers:
            peer.repeat()
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    steps = {peer.runtime: min(peer.times) for peer in peers}

    def over(peer: Peer, other: str) -> float | None:
        return steps[peer.runtime] / steps[other] if other in steps and peer.runtime != other else None

    return [
        StepResult(
            model=manifest.name,
            runtime=peer.runtime,
            threads=threads,
            batch=manifest.train_batch_size,
            step_s=steps[peer.runtime],
            peak_rss_bytes=peer.finish(),
            step_over_tf=over(peer, "tensorflow"),
            step_over_torch=over(peer, "torch"),
        )
        for peer in peers
    ]


def print_sizes(pythons: dict[str, list[str]]) -> None:
    """What the packages of each environment take on disk."""
    needs = {"small": "covey", "tensorflow": "tensorflow-cpu", "torch": "torch"}
    for kind, all_ in pythons.items():
        for python in all_:
            command = [python, str(STEPS), "size", needs[kind]]
            size = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{needs[kind]:15} {size / 1e6:8.0f} MB installed, with all that it needs ({python})")


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
    ratios = ((result.step_over_tf, "TensorFlow"), (result.step_over_torch, "PyTorch"))
    over = "".join(f"  {ratio:5.2f} x {other}" for ratio, other in ratios if ratio is not None)
    print(
        f"{result.model:9} {result.runtime:15} {result.threads} threads  "
        f"{1e3 * result.step_s:8.3f} ms a step of {result.batch:2}  "
        f"{result.peak_rss_bytes / 2**20:6.1f} MiB at the peak{over}",
        flush=True,
    )


def interpreters(litert: Path, torch: Path) -> dict[str, list[str]]:
    """The Pythons of each kind of runtime that are there."""
    found = {"small": [sys.executable, *([str(litert)] if litert.exists() else [])]}
    if importlib.util.find_spec("tensorflow") is not None:
        found["tensorflow"] = [sys.executable]
    if torch.exists():
        found["torch"] = [str(torch)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", action="store_true", help="run the watch recipe instead of timing steps")
    parser.add_argument("--models", nargs="+", help="which ones; by default all of models/architectures")
    parser.add_argument("--litert", type=Path, default=Path(".venv313/bin/python"), help="another Python")
    parser.add_argument("--torch", type=Path, default=Path(".venv-torch/bin/python"), help="PyTorch's Python")
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
        pythons = interpreters(options.litert, options.torch)
        print_sizes(pythons)
        results = measure_steps(options.models or list(NAMES), pythons)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
