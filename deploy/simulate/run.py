"""The simulation itself: from a plan to the report of a run that no device took part in.

One of two files that know both applications (the other is the demo's), so it lives outside both cores.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aggregator.optimizers import Server, server_optimizer
from aggregator.privacy import account, gaussian_reference
from aggregator.rounds.planning import CampaignSettings, check_settings
from aggregator.settings import DEFAULT_DELTA, CampaignRequest, InvalidSettings
from deploy.demo.processes import signals_raise
from deploy.demo.report import summary_table, write_report
from deploy.demo.result import ConfusionMatrix, DemoResult, ModelVersion, PersonAccuracy, Simulation
from deploy.simulate.local import run_local
from deploy.simulate.options import (
    Engine,
    PlanFile,
    SimulationError,
    SimulationOptions,
)
from deploy.simulate.population import BUNDLED, Population, populate
from deploy.simulate.task import RoundOutcome, Task
from deploy.simulate.tff import check_tff, find_python, run_tff
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Evaluation
from models import zoo
from models.zoo import BundledModel
from protocol.dp.errors import PrivacyError
from protocol.dp.parameters import PrivacyMode
from protocol.plan import TrainingParameters
from protocol.secagg.costs import device_costs
from protocol.secagg.parameters import parameters

DEFAULT_COHORT = 10
UNIT = "device (simulated)"
ENGINES: dict[Engine, Callable[[Task], Generator[RoundOutcome, None, None]]] = {
    Engine.LOCAL: run_local,
    Engine.TFF: run_tff,
}


def run_simulation(options: SimulationOptions, console: Console | None = None) -> DemoResult:
    """Simulates the campaign, writes its report and prints its table.

    Raises:
        SimulationError: it cannot be done as asked; says what to change.
    """
    console = console or Console()
    result = measure(options, console)
    page = write_report(result, options.report)
    console.print(summary_table(result))
    console.print(f"report: {page}", soft_wrap=True)
    return result


def measure(options: SimulationOptions, console: Console) -> DemoResult:
    """Simulates the campaign.

    Raises:
        SimulationError: it cannot be done as asked; says what to change.
    """
    began = time.perf_counter()
    try:
        task, population = prepare(options)
        outcomes, evaluations = _train(options.engine, task, population, console)
    except PrivacyError as error:
        raise SimulationError(str(error)) from error
    return _compose(options, task, population, outcomes, evaluations, time.perf_counter() - began)


def prepare(options: SimulationOptions) -> tuple[Task, Population]:
    """Works out everything that can be refused, before anything trains.

    Raises:
        SimulationError: there is no such model or data, or the figures make no campaign.
    """
    plan = options.plan
    source = plan.model or (options.data if options.data in BUNDLED else None)
    if source is None:
        raise SimulationError("which model? Give --model, or --data watch or digits for one of Covey's own")
    data = options.data or (source if source in BUNDLED else None)
    if data is None:
        raise SimulationError(f"the model {source} has no data of its own: give --data")
    if options.engine is Engine.TFF:
        find_python()
    model = _model(source)
    seed = 1 if plan.seed is None else plan.seed
    population = populate(data, model.manifest, devices=plan.population, held_out=options.held_out, seed=seed)
    rounds, settings = _settings(plan, model, len(population.devices), seed)
    if not isinstance(settings.asks, TrainingParameters):
        raise SimulationError("a simulation trains a model: it answers no queries")
    server = plan.server_optimizer or Server.FEDAVG
    task = Task(
        source=source,
        model=model,
        devices=population.devices,
        settings=settings,
        training=settings.asks,
        rounds=rounds,
        server=server,
        optimizer=server_optimizer(server, plan.server_learning_rate),
        seed=seed,
    )
    if options.engine is Engine.TFF:
        check_tff(task)
    return task, population


def _model(source: str) -> BundledModel:
    """Version 1: of Covey's own as it comes, of any other exported here."""
    if source in zoo.NAMES:
        return zoo.load(source)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("tensorflow") is None:
        raise SimulationError(
            f"{source} has to be exported first, which needs TensorFlow: pip install 'covey[models]'"
        )
    from models.architectures.source import load_architecture

    try:
        exported = load_architecture(source).export()
    except ValueError as error:
        raise SimulationError(str(error)) from error
    return BundledModel(exported.manifest, exported.graph, exported.weights)


def _settings(plan: PlanFile, model: BundledModel, devices: int, seed: int) -> tuple[int, CampaignSettings]:
    """Rounds and settings, as `covey round start` would make them of the same figures."""
    mode = plan.mode or PrivacyMode.NONE
    if mode is PrivacyMode.EXAMPLE:
        raise SimulationError("mode example is not simulated: its noise is in the training of each device")
    request = CampaignRequest(
        model=model.manifest.name,
        rounds=plan.rounds,
        cohort=plan.cohort or min(DEFAULT_COHORT, devices),
        minimum=plan.min_survivors,
        min_survivors=plan.min_survivors,
        local_epochs=plan.local_epochs,
        learning_rate=plan.learning_rate,
        proximal_mu=plan.proximal_mu,
        privacy=mode,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        adaptive_quantile=plan.adaptive_quantile,
        bits=plan.bits,
        delta=DEFAULT_DELTA if plan.delta is None else plan.delta,
        seed=seed,
    )
    try:
        rounds, settings = request.resolve()
        if plan.noise is not None:
            privacy = settings.privacy.model_copy(update={"noise": plan.noise})
            settings = settings.model_copy(update={"privacy": privacy})
        check_settings(settings, model.manifest)
    except (InvalidSettings, ValueError) as error:
        raise SimulationError(str(error)) from error
    if settings.cohort.size > settings.cohort.subcohort_limit:
        raise SimulationError(
            f"a cohort of more than {settings.cohort.subcohort_limit} is split, which is not simulated"
        )
    if settings.cohort.size > devices:
        raise SimulationError(
            f"a population of {devices} cannot give a cohort of {settings.cohort.size}: simulate more devices"
        )
    return rounds, settings


def _train(
    engine: Engine, task: Task, population: Population, console: Console
) -> tuple[list[RoundOutcome], list[list[Evaluation]]]:
    """Runs every round, and evaluates every version on the held-out devices' own trainer."""
    trainer = TfliteTrainer(task.manifest, task.model.graph)

    def evaluated(weights: NDArray[np.float32]) -> list[Evaluation]:
        return [trainer.evaluate(weights, person) for person in population.held_out]

    outcomes, evaluations = [], [evaluated(task.model.weights)]
    columns = (
        TextColumn("simulated round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with (
        signals_raise(),
        Progress(*columns, console=console, transient=True) as progress,
        closing(ENGINES[engine](task)) as rounds,
    ):
        bar = progress.add_task("", total=task.rounds, figures="starting")
        for outcome in rounds:
            outcomes.append(outcome)
            evaluations.append(evaluated(outcome.weights))
            accuracy, loss = _mean(evaluations[-1])
            figures = f"accuracy {accuracy:.1%}, loss {loss:.4f}"
            progress.update(bar, advance=1, figures=figures)
            if not console.is_terminal:
                console.print(f"simulated round {len(outcomes)} of {task.rounds}: {figures}", highlight=False)
    return outcomes, evaluations


def _mean(evaluations: Sequence[Evaluation]) -> tuple[float, float]:
    """Accuracy and loss, each held-out device counting the same."""
    return (
        float(np.mean([found.accuracy for found in evaluations])),
        float(np.mean([found.loss for found in evaluations])),
    )


def _epsilon(task: Task, outcomes: Sequence[RoundOutcome]) -> float | None:
    """What the rounds would have cost a device that was in all of them; None without noise."""
    privacy = task.settings.privacy
    if privacy.mode is PrivacyMode.NONE:
        return None
    events = [outcome.event for outcome in outcomes if outcome.event is not None]
    if events:
        return account(events, privacy.delta).epsilon
    # TFF's central noise is the continuous Gaussian, of which the multiplier says all.
    return gaussian_reference(
        privacy.noise_multiplier, rounds=len(outcomes), delta=privacy.delta, method="rdp"
    )


def _compose(
    options: SimulationOptions,
    task: Task,
    population: Population,
    outcomes: Sequence[RoundOutcome],
    evaluations: Sequence[Sequence[Evaluation]],
    wall_seconds: float,
) -> DemoResult:
    manifest, privacy, cohort = task.manifest, task.settings.privacy, task.settings.cohort
    graph = parameters(cohort.size, cohort.graph)
    costs = device_costs(graph, manifest.parameter_count + len(privacy.slots), privacy.bits)
    curve = [_mean(found) for found in evaluations]
    seconds = [outcome.seconds for outcome in outcomes]
    confusion = sum(found.confusion for found in evaluations[-1])
    versions = {1: task.model.weights, 1 + len(outcomes): outcomes[-1].weights}
    epsilon = _epsilon(task, outcomes)
    return DemoResult(
        dataset=population.name,
        devices=len(population.devices),
        folds=1,
        rounds=len(outcomes),
        seed=task.seed,
        broker="none",
        runtime=TfliteTrainer.runtime,
        simulation=Simulation(
            engine=options.engine.value,
            cohort=cohort.size,
            loss_per_round=tuple(loss for _, loss in curve),
            server_optimizer=f"{task.server}, learning rate {task.optimizer.learning_rate:g}",
            refused_updates=sum(outcome.refused for outcome in outcomes),
        ),
        local_accuracy=None,
        federated_accuracy=curve[-1][0],
        central_accuracy=None,
        accuracy_per_round=tuple(accuracy for accuracy, _ in curve),
        people=tuple(
            PersonAccuracy(
                person=person.name,
                fold=0,
                examples=len(person),
                local=None,
                federated=found.accuracy,
                central=None,
            )
            for person, found in zip(population.held_out, evaluations[-1], strict=True)
        ),
        device_predictions_right=None,
        confusion=ConfusionMatrix(
            labels=manifest.labels,
            counts=tuple(tuple(int(count) for count in row) for row in np.asarray(confusion)),
        ),
        privacy=privacy.mode.value,
        epsilon=epsilon if epsilon is None or math.isfinite(epsilon) else None,
        delta=privacy.delta if privacy.mode is not PrivacyMode.NONE else 0.0,
        privacy_unit=UNIT,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        dropouts_survived=0,
        seconds_per_phase={"simulated training and sum": float(np.mean(seconds))},
        upload_bytes_per_round=costs.upload_bytes + costs.control_up_bytes,
        download_bytes_per_round=costs.control_down_bytes + manifest.weights.size,
        device_peak_rss_bytes=None,
        wall_seconds=wall_seconds,
        round_seconds=float(sum(seconds)),
        model_versions=tuple(
            ModelVersion(
                version=number,
                sha256=hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).hexdigest(),
                note="digest of its weights",
            )
            for number, weights in versions.items()
        ),
    )
