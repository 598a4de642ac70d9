"""Rounds of the toy model: what tests ask for, and what must come of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aggregator.optimizers import FedAvg
from aggregator.round_operations import RoundView
from aggregator.rounds.report import PhaseReport
from aggregator.settings import CampaignRequest
from models.weights import decode_weights
from protocol import ring
from protocol.dp.mechanism import decode
from protocol.identity import SignedDocument
from protocol.plan import Deadlines, Plan, TrainTask
from protocol.round_encoding import round_encoding
from tests.aggregator_bench import Bench
from tests.aggregator_devices import toy_input

REQUEST = CampaignRequest(
    "toy",
    rounds=1,
    cohort=5,
    minimum=3,
    min_survivors=3,
    deadlines=Deadlines(
        advertise_keys=20, share_keys=20, masked_input=60, consistency_check=20, unmasking=20, offline_grace=5
    ),
)
PHASES = ["AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"]


def request(**changes: object) -> CampaignRequest:
    return CampaignRequest(**{**vars(REQUEST), **changes})  # type: ignore[arg-type]


def expected_weights(bench: Bench, view: RoundView) -> NDArray[np.float32]:
    """What FedAvg must give: the base and the plain sum of the survivors' integers, without any masks."""
    document = SignedDocument.model_validate_json(view.record.plan)
    plan = Plan.from_bytes(document.payload)
    encoding = round_encoding(plan, document.digest, bench.parameters)
    total = np.zeros(encoding.length, np.uint32)
    for device_id in view.report.survivors:
        ring.add(total, toy_input(device_id, encoding), encoding.bits, out=total)
    mean, metrics = decode(total, len(view.report.survivors), encoding)
    assert view.report.metrics == metrics
    assert isinstance(plan.task, TrainTask)
    base = bench.operator.model("toy", plan.task.base_version)
    state = FedAvg().init(decode_weights(base.weights, base.manifest))
    return FedAvg().apply(state, mean).parameters


def check_completed(bench: Bench, view: RoundView) -> None:
    """The round completed, and its version is the exact sum of the survivors."""
    assert view.record.status == "completed", (view.record.code, view.record.detail)
    assert view.record.version is not None
    model = bench.operator.model("toy", view.record.version)
    weights = decode_weights(model.weights, model.manifest)
    np.testing.assert_array_equal(weights, expected_weights(bench, view))


def phase(view: RoundView, name: str) -> PhaseReport:
    return next(each for each in view.report.phases if each.phase == name)
