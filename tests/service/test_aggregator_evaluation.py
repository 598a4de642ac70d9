"""Evaluations through the whole aggregator, with simulated devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.evaluations import EvaluationRequest
from aggregator.operations import OperationRefused
from aggregator.privacy.ledger import audit_ledger
from aggregator.rounds.evaluation import VersionEvaluation
from protocol import transcript
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_bench import Bench
from tests.toy_rounds import REQUEST, request

ACCURACIES = (0.5, 0.75, 1.0, 0.25, 0.0)
MEAN = 0.5


def bench(path: Path) -> Bench:
    table = Bench(path, devices=5)
    for device, accuracy in zip(table.devices.values(), ACCURACIES, strict=True):
        device.figures = {"loss": 1.0 + accuracy, "accuracy": accuracy, "examples": 40.0}
    return table


def run(table: Bench, asked: EvaluationRequest) -> VersionEvaluation:
    (view,) = table.finish(table.operator.start_evaluation(asked))
    assert view.record.status == "completed", (view.record.code, view.record.detail)
    assert view.report.evaluation is not None
    return view.report.evaluation


def test_an_evaluation_is_kept_with_its_version_and_makes_none(tmp_path: Path) -> None:
    table = bench(tmp_path)
    assert table.operator.evaluation("toy", 1) is None
    found = run(table, EvaluationRequest("toy", cohort=5, privacy=PrivacyMode.NONE))
    assert (found.model, found.version, found.participants, found.epsilon) == ("toy", 1, 5, None)
    means = {name: figure.mean for name, figure in found.metrics.items()}
    assert means == pytest.approx({"loss": 1.5, "accuracy": MEAN, "examples": 40.0}, abs=0.05)
    assert found.metrics["accuracy"].low <= MEAN <= found.metrics["accuracy"].high
    assert found.metrics["accuracy"].standard_error < 1e-4
    assert table.operator.evaluation("toy", 1) == found
    assert [version.version for version in table.operator.versions()] == [1]
    later = run(table, EvaluationRequest("toy", version=1, cohort=5, privacy=PrivacyMode.NONE))
    assert table.operator.evaluations("toy") == (found, later)
    assert table.operator.evaluation("toy", 1) == later


@pytest.mark.parametrize("mode", [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL])
def test_the_ledger_and_the_transcript_tell_of_an_evaluation(tmp_path: Path, mode: PrivacyMode) -> None:
    table = bench(tmp_path)
    found = run(table, EvaluationRequest("toy", cohort=5, privacy=mode, noise_multiplier=2.0))
    accuracy = found.metrics["accuracy"]
    # Half the bound over share and devices, times the noise multiplier: more only where few survivors were
    # accounted for. Six standard errors: by chance once in 500 million runs.
    assert accuracy.standard_error == pytest.approx(2.0 / (2 * 0.8 * 5), rel=0.3)
    assert abs(accuracy.mean - MEAN) < 6 * accuracy.standard_error
    assert found.epsilon is not None and found.epsilon > 0
    with table.repository.read() as reader:
        (entry,) = reader.ledger("toy")
        records = transcript.verify(reader.transcript(found.round_id), transcript.GENESIS)
        audit = audit_ledger(reader, 1e-5)
    assert entry.round_id == found.round_id
    assert not audit.differences and audit.models["toy"].epsilon == pytest.approx(found.epsilon)
    (answer,) = [r.content for r in records if isinstance(r.content, transcript.AnswerRecord)]
    assert answer.answer_sha256 == found.digest


def test_an_evaluation_runs_beside_training_on_other_devices(tmp_path: Path) -> None:
    table = Bench(tmp_path, devices=10)
    for device in table.devices.values():
        device.figures = {"loss": 1.0, "accuracy": 0.5, "examples": 40.0}
    training = table.start(request(rounds=1))
    evaluation = table.operator.start_evaluation(
        EvaluationRequest("toy", cohort=5, privacy=PrivacyMode.NONE, deadlines=REQUEST.deadlines)
    )
    table.run_until(lambda: len(table.operator.live_rounds()) == 2, seconds=60)
    (trained,) = table.finish(training)
    (evaluated,) = table.finish(evaluation)
    assert not set(trained.record.invited) & set(evaluated.record.invited)
    assert trained.record.version == 2 and evaluated.report.evaluation is not None


def test_an_evaluation_survives_a_crash_of_the_aggregator(tmp_path: Path) -> None:
    table = bench(tmp_path)
    campaign = table.operator.start_evaluation(
        EvaluationRequest("toy", cohort=5, privacy=PrivacyMode.NONE, deadlines=REQUEST.deadlines)
    )
    table.run_until(lambda: table.phase() == "MaskedInput")
    table.boot()
    (view,) = table.finish(campaign)
    assert view.report.evaluation is not None
    assert view.report.evaluation.metrics["accuracy"].mean == pytest.approx(MEAN, abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (EvaluationRequest("toy", version=7), "no published toy v7"),
        (EvaluationRequest("other"), "no published other"),
        (EvaluationRequest("toy", privacy=PrivacyMode.EXAMPLE), "mode example"),
        (EvaluationRequest("toy", privacy=PrivacyMode.NONE, noise_multiplier=1.0), "noise_multiplier"),
    ],
)
def test_what_nobody_can_evaluate_is_refused(tmp_path: Path, asked: EvaluationRequest, why: str) -> None:
    with pytest.raises(OperationRefused, match=why):
        bench(tmp_path).operator.start_evaluation(asked)
