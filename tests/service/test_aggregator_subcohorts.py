"""Rounds whose cohort is split: exact sums, failures that stay where they are, and one ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.optimizers import FedAvg
from aggregator.privacy.ledger import audit_ledger
from aggregator.round_operations import RoundView
from models.weights import decode_weights
from protocol import ring, transcript
from protocol.dp.events import DPEvent
from protocol.dp.mechanism import decode
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument
from protocol.plan import Plan, TrainTask
from protocol.round_encoding import round_encoding
from tests.aggregator_bench import Bench
from tests.aggregator_devices import toy_input
from tests.toy_rounds import REQUEST

SPLIT = replace(REQUEST, cohort=30, minimum=10, min_survivors=5, subcohort_limit=15)
"""Two sub-cohorts, of sizes that the hash of the plan decides, which is fresh in every run: see `begun`."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, devices=30)
    yield bench
    bench.close()


def plan_of(view: RoundView) -> tuple[Plan, bytes]:
    document = SignedDocument.model_validate_json(view.record.plan)
    return Plan.from_bytes(document.payload), document.digest


def parts_of(view: RoundView) -> tuple[tuple[str, ...], ...]:
    plan, digest = plan_of(view)
    return plan.cohort.split.parts(view.record.invited, digest)


def begun(bench: Bench, **changes: object) -> RoundView:
    """The first round whose sub-cohorts all have ten devices, which is 24 of 25 of them."""
    for _ in range(50):
        bench.start(replace(SPLIT, **changes))  # type: ignore[arg-type]
        count = len(bench.rounds())
        bench.run_until(lambda count=count: len(bench.rounds()) > count)  # type: ignore[misc]
        view = bench.rounds()[-1]
        if min(map(len, parts_of(view))) >= 10:
            return view
        ended(bench, view)
    raise AssertionError("fifty unlucky plans")


def ended(bench: Bench, view: RoundView) -> RoundView:
    def now() -> RoundView:
        return next(each for each in bench.rounds() if each.record.round_id == view.record.round_id)

    bench.run_until(lambda: now().record.status != "running")
    return now()


def expected(bench: Bench, view: RoundView) -> NDArray[np.float32]:
    """The base, and the mean over all survivors of the sums of each sub-cohort."""
    plan, digest = plan_of(view)
    encoding = round_encoding(plan, digest, bench.parameters)
    total = np.zeros(bench.parameters)
    for part in parts_of(view):
        there = sorted({*part} & {*view.report.survivors})
        vector = np.zeros(encoding.length, np.uint32)
        for device_id in there:
            ring.add(vector, toy_input(device_id, encoding), encoding.bits, out=vector)
        if there:
            total += len(there) * decode(vector, len(there), encoding)[0].astype(np.float64)
    assert isinstance(plan.task, TrainTask)
    base = bench.operator.model("toy", plan.task.base_version)
    weights = decode_weights(base.weights, base.manifest)
    mean = (total / len(view.report.survivors)).astype(np.float32)
    return FedAvg().apply(FedAvg().init(weights), mean).parameters


def check_sum(bench: Bench, view: RoundView) -> None:
    assert view.record.status == "completed", (view.record.code, view.record.detail)
    model = bench.operator.model("toy", view.record.version)
    weights = decode_weights(model.weights, model.manifest)
    np.testing.assert_allclose(weights, expected(bench, view), rtol=0, atol=1e-6)


def test_every_sub_cohort_has_a_roster_of_its_own_and_their_sums_make_one_version(bench: Bench) -> None:
    view = ended(bench, begun(bench))
    check_sum(bench, view)
    assert view.report.survivors == tuple(sorted(bench.devices))
    assert [part.cohort for part in view.report.subcohorts] == [len(part) for part in parts_of(view)]
    assert all(each.answered == each.expected == 30 for each in view.report.phases)
    with bench.repository.read() as reader:
        records = [
            transcript.Record.model_validate_json(record).content
            for record in reader.transcript(view.record.round_id)
        ]
    rosters = [content for content in records if isinstance(content, transcript.RosterRecord)]
    assert [content.size for content in rosters] == [part.cohort for part in view.report.subcohorts]
    assert len({content.roster_hash for content in rosters}) == 2


@pytest.mark.parametrize("mute", ["advertise-keys", "share-keys", "upload-offer", "unmasking-shares"])
def test_a_sub_cohort_that_fails_does_not_stop_the_others(bench: Bench, mute: str) -> None:
    view = begun(bench)
    lost, others = parts_of(view)
    for device_id in lost[2:]:
        bench.devices[device_id].mute.add(mute)
        bench.devices[device_id].crash()
    # The other one may lose a device of its own.
    quiet = others[0]
    bench.devices[quiet].mute.add("upload-offer")
    view = ended(bench, view)
    check_sum(bench, view)
    assert view.report.survivors == tuple(sorted({*others} - {quiet}))
    assert [bool(part.code) for part in view.report.subcohorts] == [True, False]
    # Those that failed are told so, and those that did not that the round completed.
    assert all(bench.devices[name].ends[view.record.round_id].completed for name in others)


def test_devices_of_a_failed_sub_cohort_are_let_go_while_the_others_go_on(bench: Bench) -> None:
    view = begun(bench)
    lost, others = parts_of(view)
    for device_id in lost:
        bench.devices[device_id].mute.add("share-keys")
        bench.devices[device_id].crash()
    bench.devices[others[0]].mute.add("upload-offer")
    bench.run_until(lambda: len(bench.devices[lost[0]].ends) > 0)
    assert bench.rounds()[-1].record.status == "running"
    end = bench.devices[lost[0]].ends[view.record.round_id]
    assert (end.completed, end.reason) == (False, "too-few-shares")


def test_without_any_sub_cohort_a_round_aborts_and_enters_what_it_spent(
    bench: Bench,
) -> None:
    view = begun(bench, privacy=PrivacyMode.DISTRIBUTED)
    early, late = parts_of(view)
    for device_id in early[2:]:
        bench.devices[device_id].mute.add("share-keys")
    for device_id in late[2:]:
        bench.devices[device_id].mute.add("unmasking-shares")
    view = ended(bench, view)
    assert view.record.status == "aborted"
    assert view.record.detail.startswith("2 of 2 sub-cohorts failed, the first: 2 of ")
    assert view.report.survivors == ()
    with bench.repository.read() as reader:
        event = DPEvent.model_validate_json(reader.ledger("toy")[-1].event)
        assert audit_ledger(reader, 1e-5).differences == ()
    assert event.survivors == len(late)


def test_a_private_round_spends_what_its_smallest_sum_spends(bench: Bench) -> None:
    view = ended(bench, begun(bench, privacy=PrivacyMode.DISTRIBUTED))
    assert view.record.status == "completed"
    with bench.repository.read() as reader:
        event = DPEvent.model_validate_json(reader.ledger("toy")[-1].event)
        assert audit_ledger(reader, 1e-5).differences == ()
    assert event.survivors == min(part.survivors for part in view.report.subcohorts)
    assert event.minimum_survivors == 5


@pytest.mark.parametrize("phase", ["ShareKeys", "MaskedInput", "Unmasking"])
def test_a_split_round_outlives_a_restart_of_the_service(bench: Bench, phase: str) -> None:
    view = begun(bench)
    first, *_ = parts_of(view)
    # One of its sub-cohorts waits for a device that says nothing, so that they are in different phases.
    bench.devices[first[0]].mute.add("share-keys")
    bench.run_until(lambda: bench.phase() == phase or bench.rounds()[-1].record.status != "running")
    bench.boot()
    view = ended(bench, view)
    check_sum(bench, view)
    assert view.report.survivors == tuple(sorted({*bench.devices} - {first[0]}))
