"""From what was seen of each fold to the figures of the report. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aggregator.records import Version
from aggregator.round_operations import RoundView
from deploy.demo.baselines import Baselines
from deploy.demo.options import DemoOptions, Fold, KillMoment
from deploy.demo.result import ConfusionMatrix, DemoResult, Dropout, ModelVersion, PersonAccuracy, PhaseSpan
from edge_client.training import Evaluation
from models.examples import Examples
from models.zoo import BundledModel
from protocol.identity import SignedDocument
from protocol.plan import Plan

PRIVACY_UNIT = "device (all recordings of one person)"


@dataclass(frozen=True, slots=True)
class FoldOutcome:
    """What one fold showed.

    Attributes:
        fold: who trained and who tested.
        model: version 1.
        held_out: the people nobody trained on.
        evaluations: of each version, on each held-out person.
        baselines: what the federation is compared with.
        views: its rounds.
        killed: (round, device, moment) of every kill.
        versions: that were published.
        device_predictions: share of the held-out people's examples that their own devices got right.
        device_peak_rss_bytes: the largest device process at its largest.
        runtime: of the devices.
        round_seconds: of all rounds together.
    """

    fold: Fold
    model: BundledModel
    held_out: tuple[Examples, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    baselines: Baselines
    views: tuple[RoundView, ...]
    killed: tuple[tuple[int, str, KillMoment], ...]
    versions: tuple[Version, ...]
    device_predictions: float
    device_peak_rss_bytes: int
    runtime: str
    round_seconds: float


def compose(
    options: DemoOptions, broker: str, outcomes: Sequence[FoldOutcome], *, began: float, ended: float
) -> DemoResult:
    """Joins the folds: means of accuracies and traffic; timeline and dropouts of the first.

    Args:
        options: of the demo.
        broker: what the report calls the broker.
        outcomes: of at least one fold.
        began: seconds since 1970.
        ended: seconds since 1970.
    """
    first = outcomes[0]
    people = [person for outcome in outcomes for person in _people(outcome)]
    plan = _plan(first.views[0])
    reports = [view.report for outcome in outcomes for view in outcome.views]
    traffic = [passed for report in reports for passed in report.traffic.values()]
    curves = [
        [float(np.mean([found.accuracy for found in version])) for version in outcome.evaluations]
        for outcome in outcomes
    ]
    confusion = sum(found.confusion for outcome in outcomes for found in outcome.evaluations[-1])
    return DemoResult(
        dataset=options.dataset,
        devices=len(first.fold.training),
        folds=len(outcomes),
        rounds=len(first.views),
        seed=options.seed,
        broker=broker,
        runtime=first.runtime,
        local_accuracy=_mean([person.local for person in people if person.local is not None]),
        federated_accuracy=_mean([person.federated for person in people]),
        central_accuracy=_mean([person.central for person in people if person.central is not None]),
        accuracy_per_round=tuple(float(value) for value in np.mean(curves, axis=0)),
        people=tuple(people),
        device_predictions_right=_mean([outcome.device_predictions for outcome in outcomes]),
        confusion=ConfusionMatrix(
            labels=first.model.manifest.labels,
            counts=tuple(tuple(int(count) for count in row) for row in np.asarray(confusion)),
        ),
        privacy=options.privacy,
        epsilon=max((report.epsilon for report in reports if report.epsilon is not None), default=None),
        delta=plan.privacy.delta if options.privacy != "none" else 0.0,
        privacy_unit=PRIVACY_UNIT,
        noise_multiplier=plan.privacy.noise_multiplier,
        clip_norm=plan.privacy.clip_norm,
        dropouts_survived=sum(
            number == view.record.number and device not in view.report.survivors
            for outcome in outcomes
            for view in outcome.views
            if view.record.status == "completed"
            for number, device, _ in outcome.killed
        ),
        dropouts=tuple(_dropouts(first, began)),
        timeline=tuple(_timeline(first, began)),
        seconds_per_phase=_seconds_per_phase(outcomes),
        upload_bytes_per_round=round(_mean([passed.up for passed in traffic])),
        download_bytes_per_round=round(_mean([passed.down for passed in traffic])),
        device_peak_rss_bytes=max(outcome.device_peak_rss_bytes for outcome in outcomes),
        wall_seconds=ended - began,
        round_seconds=_mean([outcome.round_seconds for outcome in outcomes]),
        model_versions=tuple(
            ModelVersion(
                version=version.version,
                sha256=version.manifest_sha256,
                note=f"round {version.round_id[:8]}" if version.round_id else "published",
            )
            for version in first.versions
        ),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _people(outcome: FoldOutcome) -> list[PersonAccuracy]:
    return [
        PersonAccuracy(
            person=person.name,
            fold=outcome.fold.index,
            examples=len(person),
            local=outcome.baselines.local[person.name],
            federated=found.accuracy,
            central=outcome.baselines.central[person.name],
        )
        for person, found in zip(outcome.held_out, outcome.evaluations[-1], strict=True)
    ]


def _plan(view: RoundView) -> Plan:
    return Plan.from_bytes(SignedDocument.model_validate_json(view.record.plan).payload)


def _timeline(outcome: FoldOutcome, began: float) -> list[PhaseSpan]:
    return [
        PhaseSpan(
            round=view.record.number,
            phase=phase.phase,
            start=max(0.0, phase.started - began),
            end=max(0.0, phase.started - began, phase.ended - began),
        )
        for view in outcome.views
        for phase in view.report.phases
        if phase.ended is not None
    ]


def _dropouts(outcome: FoldOutcome, began: float) -> list[Dropout]:
    found = []
    for number, device, moment in outcome.killed:
        missed = "ShareKeys" if moment is KillMoment.BEFORE_SHARES else "MaskedInput"
        view = next(view for view in outcome.views if view.record.number == number)
        phase = next((phase for phase in view.report.phases if phase.phase == missed), None)
        if phase is None or device in view.report.survivors:
            continue
        later = (v.record.number for v in outcome.views if device in v.report.survivors)
        found.append(
            Dropout(
                round=number,
                device=device,
                phase=missed,
                at=max(0.0, phase.started - began),
                returned_round=next((back for back in later if back > number), None),
            )
        )
    return found


def _seconds_per_phase(outcomes: Sequence[FoldOutcome]) -> dict[str, float]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        for span in _timeline(outcome, 0.0):
            seconds[span.phase].append(span.end - span.start)
    return {phase: _mean(values) for phase, values in seconds.items()}
