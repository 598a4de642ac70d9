"""Campaigns with the real service in its own process, behind a real broker."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

from aggregator import main as covey
from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from protocol.plan import Deadlines
from tests.aggregator_devices import model_files
from tests.aggregator_process import ServiceProcess, SimulatedFleet

PARAMETERS = 500
REQUEST = CampaignRequest(
    "toy", rounds=3, cohort=4, minimum=3, min_survivors=3, gather_seconds=0.2,
    deadlines=Deadlines(advertise_keys=60, share_keys=60, masked_input=60),
)  # fmt: skip


def test_schedule_pause_resume_cancel_and_two_models(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    with (
        SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=8, parameters=PARAMETERS) as fleet,
        ServiceProcess(state, mosquitto.url) as service,
    ):
        fleet.wait(lambda: covey.is_running(state))
        with covey.connect(state) as client:
            client.publish(*model_files(PARAMETERS, name="other", seed=3))

            def status(campaign_id: str) -> str:
                return client.campaign(campaign_id).status

            # Two models at once, on devices of their own.
            fleet.pause = 0.5
            both = [client.start_rounds(replace(REQUEST, model=name, rounds=1)) for name in ("toy", "other")]
            fleet.wait(lambda: sum(each.status == "running" for each in client.rounds()) == 2)
            fleet.pause = 0.0
            fleet.wait(lambda: all(status(each.campaign) == "finished" for each in both))
            first, second = client.rounds()
            assert {first.model, second.model} == {"toy", "other"}
            assert not set(first.invited) & set(second.invited)
            assert client.selection(first.round).chosen == first.invited

            # A schedule: due by the clock of the year before, as after a long downtime: one round, no burst.
            nightly = client.start_rounds(replace(REQUEST, schedule="0 2 1 1 *", time_zone="Europe/Berlin"))
            assert service.end(signal.SIGTERM) == 0
            with covey.open_operator(state) as operator, operator.repository.write() as writer:
                writer.set_due(nightly.campaign, time.time() - 40_000_000)
            service.start()
            fleet.wait(lambda: covey.is_running(state))
        with covey.connect(state) as client:
            fleet.wait(lambda: len(client.rounds(nightly.campaign)) == 1)
            fleet.wait(lambda: client.rounds(nightly.campaign)[0].status == "completed")
            now = client.campaign(nightly.campaign)
            assert now.due_at is not None and now.due_at > time.time() and now.started == 1

            # Paused in the middle of a round: that one ends, no other begins.
            campaign = client.start_rounds(REQUEST)
            fleet.wait(lambda: len(client.rounds(campaign.campaign)) == 1)
            assert client.pause_campaign(campaign.campaign).status == "paused"
            fleet.wait(lambda: client.rounds(campaign.campaign)[0].status == "completed")
            time.sleep(1.5)  # some polls of the service
            assert len(client.rounds(campaign.campaign)) == 1
            client.resume_campaign(campaign.campaign)
            fleet.pause = 0.5
            fleet.wait(lambda: len(client.rounds(campaign.campaign)) == 2)
            client.cancel_campaign(campaign.campaign)
            fleet.pause = 0.0
            fleet.wait(lambda: client.rounds(campaign.campaign)[1].status != "running")
            assert client.rounds(campaign.campaign)[1].code == "cancelled"
            assert client.campaign(campaign.campaign).status == "cancelled"
            assert client.ledger(1e-5).matches
        assert "Traceback" not in service.log
