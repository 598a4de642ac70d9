"""Server optimizers in campaigns: what they remember survives crashes, and only their rounds move it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.operations import OperationRefused
from aggregator.optimizers import FedAdam, FedAvgM, Server, memory, resumed, server_optimizer
from aggregator.round_operations import RoundView
from aggregator.rounds.planning import CampaignSettings
from models.weights import decode_weights
from protocol import ring
from protocol.dp.mechanism import decode
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.round_encoding import round_encoding
from tests.aggregator_bench import Bench
from tests.aggregator_devices import toy_input
from tests.toy_rounds import request


def mean_update(bench: Bench, view: RoundView) -> NDArray[np.float32]:
    """The mean of the survivors' plain inputs, without any masks."""
    document = SignedDocument.model_validate_json(view.record.plan)
    plan = Plan.from_bytes(document.payload)
    encoding = round_encoding(plan, document.digest, bench.parameters)
    total = np.zeros(encoding.length, np.uint32)
    for device_id in view.report.survivors:
        ring.add(total, toy_input(device_id, encoding), encoding.bits, out=total)
    return decode(total, len(view.report.survivors), encoding)[0]


def weights(bench: Bench, version: int) -> NDArray[np.float32]:
    model = bench.operator.model("toy", version)
    return decode_weights(model.weights, model.manifest)


@pytest.mark.parametrize("server", list(Server))
def test_a_campaign_follows_its_optimizer_through_crashes(tmp_path: Path, server: Server) -> None:
    bench = Bench(tmp_path)
    campaign = bench.start(request(rounds=4, optimizer=server, server_learning_rate=0.5))
    for number in (1, 2):
        # A crash in the round, and one between rounds.
        bench.run_until(lambda: bench.phase() == "MaskedInput")
        bench.boot()
        bench.run_until(lambda number=number: len(bench.operator.versions()) > number)  # type: ignore[misc]
        bench.boot()
    # A round that is aborted moves nothing.
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    before = bench.devices.copy()
    bench.hang_up(*list(bench.devices)[:3])
    bench.run_until(lambda: bench.rounds()[-1].record.status == "aborted", seconds=200)
    bench.come_back(*list(before)[:3])
    views = [view for view in bench.finish(campaign) if view.record.status == "completed"]
    assert [view.record.version for view in views] == [2, 3, 4]
    optimizer = server_optimizer(server, 0.5)
    state = optimizer.init(weights(bench, 1))
    for view in views:
        state = optimizer.apply(state, mean_update(bench, view))
        assert view.record.version is not None
        np.testing.assert_array_equal(weights(bench, view.record.version), state.parameters)
    with bench.repository.read() as reader:
        assert (
            reader.optimizer_memory(campaign.campaign_id) is None
        )  # nothing is left of a campaign that ended


def test_each_campaign_has_a_memory_of_its_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.start(request(rounds=2, optimizer=Server.FEDAVGM))
    bench.run_until(lambda: len(bench.operator.versions()) == 2)
    bench.operator.pause_campaign(first.campaign_id)
    bench.finish(bench.start(request(rounds=1)))
    with bench.repository.read() as reader:
        kept = reader.optimizer_memory(first.campaign_id)
    assert kept is not None and kept.rounds == 1 and kept.second_moment is None
    bench.operator.resume_campaign(first.campaign_id)
    views = bench.finish(first)
    assert views[1].record.base_version == 3
    momentum = np.float32(0.9) * mean_update(bench, views[0]) + mean_update(bench, views[1])
    np.testing.assert_allclose(weights(bench, 4), weights(bench, 3) + momentum, rtol=1e-6, atol=1e-7)


def test_a_memory_that_does_not_fit_starts_anew() -> None:
    parameters = np.ones(3, np.float32)
    adam = FedAdam()
    moved = adam.apply(adam.init(parameters), np.full(3, 0.1, np.float32))
    kept = memory(moved.momentum), memory(moved.second_moment)
    again = resumed(adam, moved.parameters, 1, *kept)
    np.testing.assert_array_equal(again.momentum, moved.momentum)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.second_moment, moved.second_moment)  # type: ignore[arg-type]
    assert again.rounds == 1
    for optimizer, size in ((FedAvgM(), 3), (adam, 4)):
        fresh = resumed(optimizer, np.ones(size, np.float32), 1, *kept)
        assert fresh.rounds == 0 and not np.any(fresh.momentum)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e9])
def test_rates_that_train_nothing_are_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(OperationRefused, match="learning_rate"):
        Bench(tmp_path, devices=0).start(request(optimizer=Server.FEDADAM, server_learning_rate=rate))


def test_settings_of_an_older_covey_mean_fedavg() -> None:
    _, settings = request().resolve()
    old = settings.to_bytes().replace(settings.server.model_dump_json().encode(), b"{}")
    assert CampaignSettings.from_bytes(old).server.optimizer is Server.FEDAVG


def test_fedprox_and_staleness_reach_the_plan(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    (view,) = bench.finish(bench.start(replace(request(), proximal_mu=0.3, maximum_staleness=2)))
    plan = Plan.from_bytes(SignedDocument.model_validate_json(view.record.plan).payload)
    assert plan.task.kind == "train" and plan.task.training.proximal_mu == 0.3
    assert plan.task.training.maximum_staleness == 2
