"""What does a person gain from a model of their own?

    python benchmarks/personalisation.py [--seeds N] [--json FILE] [--plot FILE]

The watch data, everybody's recordings cut in time: the earlier part trains, the last 30 % of every recording
is the test, and no window overlaps with one on the other side. On the same test windows of each person:

    alone       trained on this person's earlier windows only, as many epochs as a federated run
    global      the federated model
    fine-tuned  the federated model after `covey-edge personalise`: kept only if better on a part of the
                earlier windows that it was not trained on
    FedPer      federated, the last layer local to each device (Arivazhagan et al. 2019, arXiv 1912.00818)

Three times: for people who took part in the training; for newcomers, who were left out of it (everybody in
turn) and whose local part is trained from the start; and for newcomers who have the first third of the
recordings only. Simulated in one process without a network or noise; updates are clipped and their plain mean
is applied.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.personalisation import PersonalConfig, personalise, split_in_time
from edge_client.training import Examples, ExamplesRejected, TrainingConfig
from models import zoo
from models.datasets import watch
from models.manifest import ModelManifest
from models.recipes import WATCH, Recipe
from models.weights import entry_vectors
from protocol.dp.clipping import clip

Weights = NDArray[np.float32]
TEST = 0.3
GAP = 1
LOCAL_LAYERS = ("exercise",)
FEW = 1 / 3
SCENARIOS = ("participant", "newcomer", "newcomer with a third")
METHODS = ("alone", "global_", "fine_tuned", "fedper")
HEADINGS = ("alone", "global", "fine-tuned", "FedPer")


@dataclass(frozen=True)
class PersonResult:
    """Accuracy on one person's test windows, in one run.

    Attributes:
        scenario: one of `SCENARIOS`.
        trained_on: this person's own windows that there were to train on.
        kept: whether the fine-tuned model was better on the part that decides.
    """

    person: str
    scenario: str
    seed: int
    trained_on: int
    test_windows: int
    alone: float
    global_: float
    fine_tuned: float
    fedper: float
    kept: bool


@dataclass(frozen=True)
class Model:
    """A graph, and the parameters that a federated run starts from."""

    manifest: ModelManifest
    trainer: TfliteTrainer
    weights: Weights


def with_local_head() -> Model:
    """The watch model with its last layer local; needs TensorFlow."""
    from models.architectures import ARCHITECTURES

    architecture = replace(
        ARCHITECTURES["watch"], name="watch-own-head", local_layers=LOCAL_LAYERS, example_gradients=False
    )
    exported = architecture.export()
    return Model(exported.manifest, TfliteTrainer(exported.manifest, exported.graph), exported.weights)


def bundled() -> Model:
    """The watch model as it is."""
    model = zoo.load("watch")
    return Model(model.manifest, TfliteTrainer(model.manifest, model.graph), np.array(model.weights))


def federate(
    model: Model, devices: Sequence[Examples], recipe: Recipe, random: np.random.Generator
) -> tuple[Weights, list[Weights | None]]:
    """All rounds; returns the shared parameters and each device's local ones."""
    config = TrainingConfig(recipe.local_epochs, recipe.learning_rate, recipe.proximal_mu)
    weights = model.weights
    own: list[Weights | None] = [None] * len(devices)
    for _ in range(recipe.rounds):
        updates = [
            model.trainer.train(weights, device, config, random, own[index])
            for index, device in enumerate(devices)
        ]
        weights = weights + np.mean([clip(update.delta, recipe.clip_norm) for update in updates], axis=0)
        own = [update.local for update in updates]
    return weights, own


def train_alone(model: Model, past: Examples, recipe: Recipe, seed: int) -> Weights:
    """A model of one person's own, from the same start and by as many epochs as a federated run."""
    config = TrainingConfig(recipe.rounds * recipe.local_epochs, recipe.learning_rate)
    return model.weights + model.trainer.train(model.weights, past, config, np.random.default_rng(seed)).delta


def own_head(model: Model, weights: Weights, past: Examples, recipe: Recipe, seed: int) -> Weights | None:
    """A newcomer's local parameters: trained in as many rounds, while the shared ones stay as they are."""
    config = TrainingConfig(recipe.local_epochs, recipe.learning_rate)
    random, local = np.random.default_rng(seed), None
    for _ in range(recipe.rounds):
        local = model.trainer.train(weights, past, config, random, local).local
    return local


def measure(seed: int, plain: Model, split: Model, config: PersonalConfig) -> list[PersonResult]:
    """All scenarios, with one order of examples."""
    sides = [split_in_time(person, TEST, GAP) for person in watch.load()]
    everybody = [past for past, _ in sides]
    together, _ = federate(plain, everybody, WATCH, np.random.default_rng(seed))
    body, heads = federate(split, everybody, WATCH, np.random.default_rng(seed))
    results = []
    for index, (past, test) in enumerate(sides):
        others = [device for device in everybody if device is not past]
        few, _ = split_in_time(past, 1.0 - FEW, 0)
        without, _ = federate(plain, others, WATCH, np.random.default_rng(seed))
        foreign, _ = federate(split, others, WATCH, np.random.default_rng(seed))
        heads_of_new = [own_head(split, foreign, own, WATCH, seed) for own in (past, few)]
        for scenario, own, shared, base, head in (
            (SCENARIOS[0], past, together, body, heads[index]),
            (SCENARIOS[1], past, without, foreign, heads_of_new[0]),
            (SCENARIOS[2], few, without, foreign, heads_of_new[1]),
        ):
            tuned, kept = fine_tuned(plain, shared, own, config)
            alone = train_alone(plain, own, WATCH, seed)
            results.append(
                PersonResult(
                    person=test.name,
                    scenario=scenario,
                    seed=seed,
                    trained_on=len(own),
                    test_windows=len(test),
                    alone=plain.trainer.evaluate(alone, test).accuracy,
                    global_=plain.trainer.evaluate(shared, test).accuracy,
                    fine_tuned=plain.trainer.evaluate(tuned, test).accuracy,
                    fedper=split.trainer.evaluate(base, test, head).accuracy,
                    kept=kept,
                )
            )
    return results


def fine_tuned(
    model: Model, weights: Weights, past: Examples, config: PersonalConfig
) -> tuple[Weights, bool]:
    """What the device answers with after `covey-edge personalise`, and whether that is personal."""
    try:
        found = personalise(model.trainer, model.manifest, weights, None, past, config)
    except ExamplesRejected:
        return weights, False
    if found.weights is None:
        return weights, False
    return entry_vectors(model.manifest, found.weights)["weights"], True


def table(results: Sequence[PersonResult], scenario: str) -> list[tuple[str, list[float]]]:
    """Name and accuracy of each method: every person over all seeds, their mean, and the worst person."""
    people = sorted({result.person for result in results})
    rows = []
    for person in people:
        chosen = [r for r in results if r.person == person and r.scenario == scenario]
        rows.append((person, [float(np.mean([getattr(r, method) for r in chosen])) for method in METHODS]))
    figures = np.array([values for _, values in rows])
    rows.append(("mean", figures.mean(axis=0).tolist()))
    rows.append(("worst person", figures.min(axis=0).tolist()))
    return rows


def print_table(results: Sequence[PersonResult], scenario: str) -> None:
    print(f"\n{scenario}\n{'':14}" + "".join(f"{heading:>12}" for heading in HEADINGS))
    for name, values in table(results, scenario):
        print(f"{name:14}" + "".join(f"{value:12.1%}" for value in values))
    chosen = [result for result in results if result.scenario == scenario]
    print(f"fine-tuned kept in {sum(r.kept for r in chosen)} of {len(chosen)} cases", flush=True)


def plot(results: Sequence[PersonResult], path: Path) -> None:
    """One panel a scenario, one line a person from the global model to the personal ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(SCENARIOS), sharey=True, sharex=True)
    marks = {
        "global_": ("o", "#52606d"),
        "fine_tuned": ("D", "#0b7285"),
        "fedper": ("s", "#d9480f"),
        "alone": ("|", "#212529"),
    }
    for axis, scenario in zip(axes, SCENARIOS, strict=True):
        rows = table(results, scenario)[:-2]
        for place, (_, values) in enumerate(rows):
            axis.plot([100 * min(values), 100 * max(values)], [place, place], color="#cbd2d9", zorder=1)
        for method, (marker, colour) in marks.items():
            index = METHODS.index(method)
            axis.scatter(
                [100 * values[index] for _, values in rows],
                range(len(rows)),
                marker=marker,
                color=colour,
                label=HEADINGS[index],
                zorder=2,
                s=34,
            )
        axis.set_yticks(range(len(rows)), [name.removeprefix("person-").lstrip("0") for name, _ in rows])
        axis.set_title(scenario, loc="left", fontsize=10)
        axis.set_xlabel("right, % of later windows")
        axis.grid(axis="x", color="#eef1f4")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("person")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=PersonalConfig().epochs, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=PersonalConfig().learning_rate)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file (needs covey[demo])")
    options = parser.parse_args()
    config = PersonalConfig(options.epochs, options.learning_rate)
    plain, split = bundled(), with_local_head()
    results: list[PersonResult] = []
    for seed in range(options.seeds):
        results += measure(seed, plain, split, config)
        print(f"run {seed + 1} of {options.seeds} done", flush=True)
    for scenario in SCENARIOS:
        print_table(results, scenario)
    if options.json:
        rows = [{name.rstrip("_"): value for name, value in asdict(result).items()} for result in results]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
