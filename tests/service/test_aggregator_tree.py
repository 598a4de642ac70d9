"""Rounds whose central noise is a tree's: who takes part, what is released, and that no noise is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from aggregator import ending, unmasking
from aggregator.operations import OperationRefused
from aggregator.privacy.ledger import audit_ledger
from aggregator.privacy.references import tree_reference
from aggregator.records import Campaign
from aggregator.round_operations import RoundView
from aggregator.rounds.release import Release
from aggregator.settings import CampaignRequest, InvalidSettings
from models.weights import decode_weights
from protocol.dp.mechanism import EncodingParameters
from protocol.dp.parameters import PrivacyMode, TreeNoise
from protocol.identity import SignedDocument
from protocol.plan import Plan
from protocol.round_encoding import round_encoding
from tests.aggregator_bench import Bench
from tests.toy_rounds import request

PARAMETERS = 2_000


def made(path: Path) -> Bench:
    bench = Bench(path, devices=12, parameters=PARAMETERS)
    for device in bench.devices.values():
        device.vector = nothing
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = made(tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Six rounds: a whole tree, and half of another."""
    bench = made(tmp_path_factory.mktemp("trained"))
    finish(bench, bench.start(tree_request()))
    yield bench
    bench.close()


class Killed(BaseException):
    """The process ends between the release and the commit."""


def nothing(device_id: str, encoding: EncodingParameters) -> NDArray[np.uint32]:
    """A contribution of zeros: what is released is noise and nothing else."""
    return np.zeros(encoding.length, np.uint32)


def tree_request(**changes: Any) -> CampaignRequest:
    figures: dict[str, Any] = {
        "cohort": 3,
        "privacy": PrivacyMode.CENTRAL,
        "noise_multiplier": 2.0,
        "restart_every": 4,
        "rounds": 6,
        "bits": 28,
    }
    return request(**figures | changes)


def plan_of(view: RoundView) -> tuple[Plan, bytes]:
    document = SignedDocument.model_validate_json(view.record.plan)
    return Plan.from_bytes(document.payload), document.digest


def tree_of(view: RoundView) -> TreeNoise:
    tree = plan_of(view)[0].privacy.tree
    assert tree is not None
    return tree


def weights(bench: Bench, version: int) -> NDArray[np.float64]:
    model = bench.operator.model("toy", version)
    return decode_weights(model.weights, model.manifest).astype(np.float64)


def noise_of(bench: Bench, view: RoundView, since: int, nodes: int) -> float:
    """Squares of the noise in the sum of updates since a version, over what so many nodes should have."""
    plan, digest = plan_of(view)
    encoding = round_encoding(plan, digest, PARAMETERS)
    assert view.record.version is not None
    moved = weights(bench, view.record.version) - weights(bench, since)
    variance = nodes * encoding.central_variance / (encoding.scale * encoding.maximum_clients) ** 2
    return float((moved**2).sum() / variance)


def finish(bench: Bench, campaign: Campaign) -> list[RoundView]:
    views = bench.finish(campaign)
    assert [view.record.status for view in views] == ["completed"] * len(views)
    return views


def test_no_device_is_in_two_rounds_of_a_tree_and_a_restart_gives_all_another_turn(trained: Bench) -> None:
    views = trained.rounds()
    places = [(tree_of(view).tree, tree_of(view).leaf) for view in views]
    first, second = places[0][0], places[4][0]
    assert places == [(first, 1), (first, 2), (first, 3), (first, 4), (second, 1), (second, 2)]
    invited = [device for view in views[:4] for device in view.record.invited]
    assert sorted(invited) == sorted(trained.devices)
    assert not set(views[4].record.invited) & set(views[5].record.invited)


def test_the_models_noise_is_the_trees(trained: Bench) -> None:
    """Chi-squared of each of six versions; false alarm below 10^-6 each. Independent noise would fail."""
    for number, (since, nodes) in enumerate([(1, 1), (1, 1), (1, 2), (1, 1), (5, 1), (5, 1)]):
        squares = noise_of(trained, trained.rounds()[number], since, nodes)
        assert chi2.isf(1 - 1e-6, PARAMETERS) < squares < chi2.isf(1e-6, PARAMETERS), number


def test_a_repeated_release_has_the_same_noise(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction that ends the second round fails after its release; the service is started again."""
    releases: list[NDArray[np.float32]] = []
    original, failures = unmasking.release, []

    def spy(*arguments: Any, **options: Any) -> Release:
        released = original(*arguments, **options)
        releases.append(released.mean_update.copy())
        return released

    finish_round = ending.Finisher._end

    def fail_once(self: Any, *arguments: Any, **options: Any) -> None:
        finish_round(self, *arguments, **options)
        if len(releases) == 2 and not failures:
            failures.append(True)
            raise Killed

    monkeypatch.setattr(unmasking, "release", spy)
    monkeypatch.setattr(ending.Finisher, "_end", fail_once)
    campaign = bench.start(tree_request(rounds=3))
    with pytest.raises(Killed):
        bench.finish(campaign)
    bench.boot()
    views = finish(bench, campaign)
    assert failures and len(releases) == 4
    np.testing.assert_array_equal(releases[1], releases[2])
    assert chi2.isf(1 - 1e-6, PARAMETERS) < noise_of(bench, views[2], 1, 2) < chi2.isf(1e-6, PARAMETERS)


def test_an_aborted_round_leaves_the_noise_of_the_others_right(bench: Bench) -> None:
    campaign = bench.start(tree_request(rounds=4))
    bench.run_until(lambda: len(bench.rounds()) == 2)
    silent = bench.rounds()[1].record.invited
    for name in silent:
        bench.devices[name].mute = {"upload-offer"}
    views = bench.finish(campaign)
    assert [view.record.status for view in views] == ["completed", "aborted", "completed", "completed"]
    # Leaf 4 is a single node, whatever came before.
    squares = noise_of(bench, views[3], 1, 1)
    assert chi2.isf(1 - 1e-6, PARAMETERS) < squares < chi2.isf(1e-6, PARAMETERS)
    # Whoever was invited may have handed out an input: it waits for the restart.
    invited = [device for view in views for device in view.record.invited]
    assert len(invited) == len(set(invited)) == 12


def test_the_ledger_counts_a_tree_once_and_the_gate_reads_it(trained: Bench) -> None:
    views = trained.rounds()
    with trained.repository.read() as reader:
        audit = audit_ledger(reader, 1e-5)
    assert not audit.differences and audit.population.rounds == 6
    expected = tree_reference(2.0, rounds=8, restart_every=4, delta=1e-5)
    assert audit.population.epsilon == pytest.approx(expected, rel=2e-2)
    assert views[-1].report.epsilon == pytest.approx(audit.population.epsilon)
    with trained.repository.read() as reader:
        assert reader.noise_tree(views[0].record.campaign_id) is None  # erased at the end
    # Two trees are within the limit, a third is not: its first round is refused, with the figure.
    limited = trained.start(tree_request(rounds=5, epsilon_limit=expected * 1.05))
    trained.run_until(lambda: trained.operator.campaign(limited.campaign_id).status == "failed")
    assert "budget gate" in trained.operator.campaign(limited.campaign_id).note


def test_a_restart_erases_the_key(bench: Bench) -> None:
    campaign = bench.start(tree_request(restart_every=1, rounds=2))
    keys = []
    for rounds in (1, 2):
        bench.run_until(lambda rounds=rounds: len(bench.rounds()) == rounds)  # type: ignore[misc]
        with bench.repository.read() as reader:
            tree = reader.noise_tree(campaign.campaign_id)
        assert tree is not None and tree.tree == tree_of(bench.rounds()[-1]).tree
        assert tree.key.hex() not in repr(tree) and repr(tree.key) not in repr(tree)
        keys.append(tree.key)
    assert keys[0] != keys[1]


def test_a_campaign_waits_for_devices_that_have_had_no_turn(bench: Bench) -> None:
    campaign = bench.start(tree_request(rounds=4))
    bench.run_until(lambda: len(bench.rounds()) == 1)
    fresh = sorted(set(bench.devices) - set(bench.rounds()[0].record.invited))
    bench.hang_up(*fresh)

    def note() -> str:
        return bench.operator.campaign(campaign.campaign_id).note

    bench.run_until(lambda: "no turn in the last 1 rounds" in note())
    bench.come_back(*fresh)
    bench.run_until(lambda: len(bench.rounds()) == 2)
    assert set(bench.rounds()[1].record.invited) <= set(fresh)


def test_too_few_devices_for_a_tree_are_told_before_anything_runs(bench: Bench) -> None:
    with pytest.raises(OperationRefused, match="15 devices are needed and 12 enrolled"):
        bench.start(tree_request(restart_every=5))
    with pytest.raises(InvalidSettings, match="mode central"):
        tree_request(privacy=PrivacyMode.DISTRIBUTED).resolve()
