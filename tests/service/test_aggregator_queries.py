"""Queries through the whole aggregator, with simulated devices that answer them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from aggregator.operations import OperationRefused
from aggregator.privacy.ledger import audit_ledger
from aggregator.queries import QueryRequest
from aggregator.records import Campaign
from aggregator.round_operations import RoundView
from aggregator.rounds.answer import HistogramAnswer, NumberAnswer
from protocol import transcript
from protocol.dp.parameters import PrivacyMode
from protocol.plan import Deadlines, HistogramQuestion, MeanQuestion, Question, SumQuestion
from tests.aggregator_bench import Bench
from tests.toy_rounds import REQUEST

VALUES = (12.0, 34.5, 21.25, 999.0, -7.0)
TRUE_MEAN = (12.0 + 34.5 + 21.25 + 80.0 + 0.0) / 5


def asked(question: Question, mode: PrivacyMode = PrivacyMode.NONE, **changes: object) -> QueryRequest:
    return QueryRequest("battery", 0.0, 80.0, question, cohort=5, privacy=mode, **changes)  # type: ignore[arg-type]


def bench(path: Path, values: Sequence[float | None] = VALUES) -> Bench:
    table = Bench(path, devices=len(values))
    for device, value in zip(table.devices.values(), values, strict=True):
        device.values = {} if value is None else {"battery": value}
    return table


def run(table: Bench, request: QueryRequest) -> tuple[Campaign, RoundView]:
    campaign = table.operator.start_query(request)
    table.run_until(lambda: table.operator.campaign(campaign.campaign_id).status in ("finished", "failed"))
    (view,) = table.operator.rounds(campaign.campaign_id)
    return table.operator.campaign(campaign.campaign_id), view


def number(view: RoundView) -> NumberAnswer:
    assert view.record.status == "completed", (view.record.code, view.record.detail)
    assert view.report.answer is not None
    assert isinstance(view.report.answer.figures, NumberAnswer)
    return view.report.answer.figures


def test_a_query_is_a_round_without_a_model(tmp_path: Path) -> None:
    table = bench(tmp_path)
    before = [version.manifest_sha256 for version in table.operator.versions()]
    campaign, view = run(table, asked(MeanQuestion()))
    assert campaign.model is None and view.record.model is None and view.record.version is None
    assert number(view).estimate == pytest.approx(TRUE_MEAN, abs=1e-4)
    assert number(view).low <= TRUE_MEAN <= number(view).high
    assert view.report.answer is not None and view.report.answer.participants == 5
    assert [version.manifest_sha256 for version in table.operator.versions()] == before
    assert all(device.ends[view.record.round_id].completed for device in table.devices.values())


def test_sums_and_histograms(tmp_path: Path) -> None:
    table = bench(tmp_path)
    _, view = run(table, asked(SumQuestion()))
    assert number(view).estimate == pytest.approx(5 * TRUE_MEAN, abs=1e-3)
    _, view = run(table, asked(HistogramQuestion(bins=4)))
    assert view.report.answer is not None
    assert isinstance(view.report.answer.figures, HistogramAnswer)
    assert view.report.answer.figures.counts == pytest.approx((2, 2, 0, 1), abs=1e-3)


@pytest.mark.parametrize("mode", [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL, PrivacyMode.LOCAL])
def test_the_ledger_and_the_transcript_tell_of_a_query(tmp_path: Path, mode: PrivacyMode) -> None:
    table = bench(tmp_path)
    _, view = run(table, asked(MeanQuestion(), mode, noise_multiplier=2.0))
    figures = number(view)
    # Six standard errors: by chance once in 500 million runs.
    assert abs(figures.estimate - TRUE_MEAN) < 6 * figures.standard_error
    assert figures.standard_error > 1
    assert view.report.epsilon is not None and 1 < view.report.epsilon < 6
    with table.repository.read() as reader:
        audit = audit_ledger(reader, 1e-5)
        (entry,) = reader.ledger()
        records = transcript.verify(reader.transcript(view.record.round_id), transcript.GENESIS)
    assert entry.model is None and not audit.differences
    assert audit.queries.rounds == audit.population.rounds == 1 and not audit.models
    content = records[-1].content
    assert isinstance(content, transcript.AnswerRecord) and view.report.answer is not None
    said = hashlib.sha256(view.report.answer.model_dump_json().encode()).hexdigest()
    assert content.answer_sha256 == view.report.answer.digest == said


def test_a_query_and_training_share_the_budget(tmp_path: Path) -> None:
    table = bench(tmp_path)
    run(table, asked(MeanQuestion(), PrivacyMode.DISTRIBUTED, noise_multiplier=2.0, epsilon_limit=3.0))
    again = table.operator.start_query(
        asked(MeanQuestion(), PrivacyMode.DISTRIBUTED, noise_multiplier=2.0, epsilon_limit=3.0)
    )
    table.run_until(lambda: table.operator.campaign(again.campaign_id).status == "failed")
    assert "epsilon" in table.operator.campaign(again.campaign_id).note
    assert not table.operator.rounds(again.campaign_id)


def test_a_field_that_nobody_declares_aborts_before_any_key_is_shown(tmp_path: Path) -> None:
    table = bench(tmp_path, [None] * 5)
    _, view = run(table, asked(MeanQuestion()))
    assert view.record.status == "aborted" and view.report.answer is None
    assert "unknown-field" in view.record.detail
    assert len(view.report.declined) == 5
    with table.repository.read() as reader:
        assert not reader.ledger()


def test_devices_without_the_field_are_counted_and_never_answered_for(tmp_path: Path) -> None:
    table = bench(tmp_path, [10.0, 20.0, 30.0, 40.0, None])
    _, view = run(table, asked(MeanQuestion()))
    assert number(view).estimate == pytest.approx(25.0, abs=1e-3)
    assert view.report.answer is not None and view.report.answer.participants == 4
    assert [why.partition(":")[0] for why in view.report.declined.values()] == ["unknown-field"]


def test_a_query_survives_restarts(tmp_path: Path) -> None:
    table = bench(tmp_path)
    campaign = table.operator.start_query(asked(MeanQuestion()))
    for number_ in itertools.count():
        if table.operator.campaign(campaign.campaign_id).status == "finished":
            break
        table.step()
        if number_ % 25 == 24:  # what is on its way is lost, and asked for again after two seconds
            table.boot()
    (view,) = table.operator.rounds(campaign.campaign_id)
    assert number(view).estimate == pytest.approx(TRUE_MEAN, abs=1e-3)


def test_queries_go_beside_the_training_of_a_model(tmp_path: Path) -> None:
    table = bench(tmp_path)
    training = table.start(REQUEST)
    query = table.operator.start_query(asked(MeanQuestion()))
    table.run_until(
        lambda: {c.status for c in table.operator.campaigns()} == {"finished"},
    )
    assert table.operator.campaign(training.campaign_id).started == 1
    (view,) = table.operator.rounds(query.campaign_id)
    assert number(view).estimate == pytest.approx(TRUE_MEAN, abs=1e-3)


def test_a_long_campaign_lets_a_query_in_between(tmp_path: Path) -> None:
    table = bench(tmp_path)
    training = table.start(replace(REQUEST, rounds=3))
    table.run_until(lambda: table.operator.campaign(training.campaign_id).started == 1)
    query = table.operator.start_query(asked(MeanQuestion()))
    table.run_until(lambda: table.operator.campaign(query.campaign_id).status == "finished")
    assert table.operator.campaign(training.campaign_id).started < 3


def test_the_sums_of_sub_cohorts_are_one_answer(tmp_path: Path) -> None:
    table = bench(tmp_path, [float(value) for value in range(10, 40)])
    request = replace(asked(MeanQuestion()), cohort=30, minimum=10, min_survivors=5, subcohort_limit=15)
    _, view = run(table, request)
    assert len(view.report.subcohorts) == 2 and view.report.answer is not None
    # Which devices are together is chance: a sub-cohort of fewer than 10 is left out, once in 25 runs.
    answered = [table.devices[name].values["battery"] for name in view.report.survivors]
    assert number(view).estimate == pytest.approx(sum(answered) / len(answered), abs=1e-4)
    assert view.report.answer.participants == len(answered) >= 15


def test_a_query_asks_only_whom_it_names(tmp_path: Path) -> None:
    table = bench(tmp_path)
    for name in ("device-0", "device-2", "device-3"):
        table.operator.label(name, ["barn"])
    _, view = run(table, asked(MeanQuestion(), where="label=barn", minimum=3, min_survivors=3))
    assert sorted(view.record.invited) == ["device-0", "device-2", "device-3"]
    assert number(view).estimate == pytest.approx((12.0 + 21.25 + 80.0) / 3, abs=1e-4)


def test_noise_that_colluders_know_is_made_up_for(tmp_path: Path) -> None:
    table = bench(tmp_path)
    errors: list[float] = []
    epsilons: list[float] = []
    for colluders in (0, 2):
        request = asked(MeanQuestion(), PrivacyMode.DISTRIBUTED, noise_multiplier=2.0, colluders=colluders)
        _, view = run(table, request)
        errors.append(number(view).standard_error)
        assert view.report.answer is not None and view.report.answer.epsilon is not None
        epsilons.append(view.report.answer.epsilon)
    # 4 survivors suffice, of which 2 may collude: each of the other 2 adds what 2 of 4 had added.
    assert errors[1] == pytest.approx(errors[0] * 2**0.5, rel=1e-3)
    # All 5 survived: noise was that of 5 / 4 in the first query, and is that of 3 / 2 beside the colluders'.
    assert epsilons[1] < epsilons[0]


def test_a_query_waits_no_longer_than_its_deadline(tmp_path: Path) -> None:
    table = bench(tmp_path)
    table.devices["device-1"].mute = {"upload-offer"}
    request = asked(MeanQuestion(), deadlines=Deadlines(masked_input=20), minimum=4, min_survivors=4)
    _, view = run(table, request)
    assert "device-1" not in view.report.survivors and len(view.report.survivors) == 4
    assert view.record.ended_at is not None and 20 <= view.record.ended_at - view.record.started_at < 40


@pytest.mark.parametrize("phase", ["AdvertiseKeys", "MaskedInput"])
def test_a_query_is_called_off_before_anything_is_known(tmp_path: Path, phase: str) -> None:
    table = bench(tmp_path)
    table.devices["device-1"].mute = {"upload-offer"}
    campaign = table.operator.start_query(asked(MeanQuestion(), PrivacyMode.DISTRIBUTED))
    table.run_until(lambda: table.phase() == phase)
    table.operator.cancel_campaign(campaign.campaign_id)
    table.run_until(lambda: bool(table.rounds()) and table.rounds()[0].record.status == "aborted")
    (view,) = table.rounds()
    assert view.record.code == "cancelled" and view.report.answer is None
    with table.repository.read() as reader:
        assert reader.ledger() == ()
    table.devices["device-1"].mute = set()  # they answer the next one
    assert number(run(table, asked(MeanQuestion()))[1]).estimate == pytest.approx(TRUE_MEAN, abs=1e-4)


@pytest.mark.parametrize(
    "request_",
    [
        asked(MeanQuestion(), minimum=6),
        QueryRequest("battery", 80.0, 0.0, MeanQuestion()),
        QueryRequest("battery", float("nan"), 80.0, MeanQuestion()),
        asked(MeanQuestion(), PrivacyMode.DISTRIBUTED, noise_multiplier=1e9),
    ],
)
def test_what_no_round_could_ask_is_refused_at_once(tmp_path: Path, request_: QueryRequest) -> None:
    table = bench(tmp_path)
    with pytest.raises(OperationRefused):
        table.operator.start_query(request_)
    assert not table.operator.campaigns()
