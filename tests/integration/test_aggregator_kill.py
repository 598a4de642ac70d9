"""SIGKILL of the real service in every phase, against a real broker: nothing lost, nothing twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator import main as covey
from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from models.weights import decode_weights
from protocol import transcript
from protocol.plan import Deadlines
from tests.aggregator_process import ServiceProcess, SimulatedFleet
from tests.round_losses import exact_weights

PARAMETERS = 60_000
PHASES = {
    "AdvertiseKeys": "advertise-keys",
    "ShareKeys": "share-keys",
    "MaskedInput": "upload-offer",
    "ConsistencyCheck": "consistency-signature",
    "Unmasking": "unmasking-shares",
}
"""What a device answers in each."""
REQUEST = CampaignRequest(
    "toy",
    rounds=2,
    cohort=4,
    minimum=3,
    min_survivors=3,
    gather_seconds=120.0,
    deadlines=Deadlines(
        **dict.fromkeys(
            ("advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking"), 120
        ),
        offline_grace=4,
    ),
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    covey.init(directory, fleet="orchard")
    return directory


@pytest.fixture
def fleet(state: Path, mosquitto: BrokerProcess) -> Iterator[SimulatedFleet]:
    with SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=4, parameters=PARAMETERS) as fleet:
        yield fleet


def check(state: Path, campaign_id: str) -> tuple[RoundView, ...]:
    """Completed rounds have the exact sum; every version is there once; the transcripts chain."""
    with covey.open_operator(state) as operator:
        views = operator.rounds(campaign_id)
        numbers = [version.version for version in operator.versions("toy")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert numbers[1:] == [view.record.version for view in views if view.record.status == "completed"]
        head = transcript.GENESIS
        for view in views:
            if view.record.status == "completed":
                model = operator.model("toy", view.record.version)
                weights = decode_weights(model.weights, model.manifest)
                np.testing.assert_array_equal(weights, exact_weights(operator, view))
            with operator.repository.read() as reader:
                records = reader.transcript(view.record.round_id)
                assert reader.log(view.record.round_id) == ()
            transcript.verify(records, head)
            head = transcript.digest(records[-1])
    return views


def ended(state: Path, campaign_id: str) -> bool:
    with covey.open_operator(state) as operator:
        return operator.campaign(campaign_id).status == "finished"


@pytest.mark.parametrize(
    "phase",
    # One of them in every run, all of them among the slow tests.
    [pytest.param(phase, marks=() if phase == "MaskedInput" else pytest.mark.chaos) for phase in PHASES],
)
def test_killed_in_a_phase_the_round_goes_on_and_the_next_one_runs(
    phase: str, state: Path, fleet: SimulatedFleet, mosquitto: BrokerProcess
) -> None:
    with ServiceProcess(state, mosquitto.url) as service:
        # One that does not answer holds the phase until it is seen.
        fleet.devices["device-0"].mute = {PHASES[phase]}
        campaign = covey.start_rounds(state, REQUEST)
        fleet.wait(lambda: fleet.phase() == phase)
        service.end(signal.SIGKILL)
        fleet.devices["device-0"].mute = set()
        service.start()
        fleet.wait(lambda: ended(state, campaign.campaign_id))
        views = check(state, campaign.campaign_id)
        assert [view.record.status for view in views] == ["completed", "completed"], service.log
        assert all(len(view.report.survivors) == 4 for view in views)
        assert service.end(signal.SIGTERM) == 0, service.log
        assert "Traceback" not in service.log
        assert "Warning" not in service.log


@pytest.mark.chaos
def test_killed_again_and_again(state: Path, broker: BrokerProcess) -> None:
    chance = np.random.default_rng(3)
    with (
        SimulatedFleet(state, broker.host, broker.port, devices=4, parameters=PARAMETERS) as fleet,
        ServiceProcess(state, broker.url) as service,
    ):
        fleet.pause = 0.03
        campaign = covey.start_rounds(state, REQUEST)
        for _ in range(5):
            time.sleep(float(chance.uniform(0.5, 1.6)))
            service.end(signal.SIGKILL)
            service.start()
        fleet.wait(lambda: ended(state, campaign.campaign_id))
        views = check(state, campaign.campaign_id)
        assert [view.record.status for view in views] == ["completed", "completed"], service.log


def test_devices_that_die_in_a_round_are_survived_and_come_back(
    state: Path, mosquitto: BrokerProcess
) -> None:
    """One device goes before its shares, another after them, and the aggregator is killed besides."""
    assert REQUEST.deadlines is not None
    deadlines = REQUEST.deadlines.model_copy(update={"offline_grace": 1.0})
    request = replace(REQUEST, cohort=7, minimum=5, min_survivors=5, deadlines=deadlines)
    with (
        SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=7, parameters=PARAMETERS) as fleet,
        ServiceProcess(state, mosquitto.url) as service,
    ):
        fleet.devices["device-1"].mute = {"share-keys"}
        fleet.devices["device-2"].mute = {"upload-offer"}
        campaign = covey.start_rounds(state, request)
        fleet.wait(lambda: fleet.phase() == "ShareKeys")
        fleet.hang_up("device-1")
        fleet.wait(lambda: fleet.phase() == "MaskedInput")
        fleet.hang_up("device-2")
        service.end(signal.SIGKILL)
        service.start()
        fleet.wait(lambda: fleet.rounds()[0].record.status != "running")
        for name in ("device-1", "device-2"):
            fleet.devices[name].mute = set()
            fleet.come_back(name)
        fleet.wait(lambda: ended(state, campaign.campaign_id))
        first, second = check(state, campaign.campaign_id)
    assert len(first.report.survivors) == 5
    assert len(second.report.survivors) == 7


@pytest.mark.chaos
def test_the_broker_dies_in_the_middle(state: Path, mosquitto: BrokerProcess) -> None:
    with (
        SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=4, parameters=PARAMETERS) as fleet,
        ServiceProcess(state, mosquitto.url) as service,
    ):
        fleet.devices["device-0"].mute = {PHASES["MaskedInput"]}
        campaign = covey.start_rounds(state, REQUEST)
        fleet.wait(lambda: fleet.phase() == "MaskedInput")
        mosquitto.kill()
        fleet.devices["device-0"].mute = set()
        time.sleep(0.5)
        mosquitto.restart()
        fleet.wait(lambda: ended(state, campaign.campaign_id))
        views = check(state, campaign.campaign_id)
        assert views[-1].record.status == "completed", service.log


def test_two_services_on_one_state_are_one_too_many(
    state: Path, fleet: SimulatedFleet, mosquitto: BrokerProcess
) -> None:
    with ServiceProcess(state, mosquitto.url) as first:
        fleet.wait(lambda: covey.is_running(state))
        with ServiceProcess(state, mosquitto.url) as second:
            fleet.wait(lambda: "another aggregator runs" in second.log)
        assert first.end(signal.SIGTERM) == 0
    assert not covey.is_running(state)
