"""A buffered campaign with the real service, a real broker, and real devices of very different speed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from aggregator import main as covey
from aggregator.client import Client
from aggregator.settings import CampaignRequest, Mode
from aggregator.web.local import LocalEndpoint
from aggregator.web.schemas import Round
from deploy.broker import BrokerProcess
from edge_client.adapters.store import DeviceStore
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from models.examples import Examples
from models.weights import decode_weights, encode_weights
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, command, running, wait_for

WATCH = zoo.load("watch")
FEW, MANY = 10, 2000
FAST, SLOW = ("barn-1", "barn-2", "barn-3"), "barn-4"
POLICY = DevicePolicy(
    minimum_cohort=3,
    minimum_survivors=3,
    privacy_modes=frozenset({PrivacyMode.NONE}),
    maximum_epsilon=None,
    maximum_local_epochs=1000,
)
REQUEST = CampaignRequest(
    "watch",
    rounds=500,
    cohort=3,
    minimum=3,
    min_survivors=3,
    mode=Mode.BUFFERED,
    maximum_staleness=100,
    local_epochs=1000,
    learning_rate=1e-4,
)


def prepared(place: Path, name: str, aggregator: Path, broker: BrokerProcess, count: int) -> Device:
    """An enrolled device with so many examples: training a thousand epochs takes as long as they are many."""
    enrol(place / name, covey.enrol(aggregator, initialise(place / name, name)))
    set_policy(place / name, POLICY)
    data = place / f"{name}-data"
    data.mkdir()
    generator = np.random.default_rng(int(name[-1]))
    x = generator.normal(size=(count, *WATCH.manifest.input.shape)).astype(np.float32)
    Examples("some", x, generator.integers(0, len(WATCH.manifest.labels), count).astype(np.int32)).save(
        data / "recordings.npz"
    )
    return Device(place / name, data, broker)


def events(device: Device, name: str) -> list[dict[str, str]]:
    """The notes of one name in a device's log."""
    lines = [line.partition(f" {name} ") for line in device.log.read_text().splitlines()]
    return [dict(field.split("=", 1) for field in rest.split()) for _, found, rest in lines if found]


def one(client: Client, round_id: str) -> Round:
    return next(each for each in client.rounds() if each.round == round_id)


def completed(client: Client) -> int:
    return sum(each.status == "completed" for each in client.rounds())


def pending(device: Device) -> int:
    with DeviceStore.open(device.state, read_only=True) as store:
        return len(store.pending())


def kill_in_a_buffer(service: ServiceProcess, state: Path) -> str:
    """SIGKILLs the service while a buffer is collected; returns its id."""
    with covey.open_operator(state) as operator:
        deadline = time.monotonic() + 120
        while not (live := operator.live_rounds()):
            assert time.monotonic() < deadline, "no buffer came"
    service.end(signal.SIGKILL)
    with covey.open_operator(state) as operator:
        running_ones = [view.record.round_id for view in operator.rounds() if view.record.status == "running"]
    return running_ones[0] if running_ones else live[0].round_id


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def aggregator(tmp_path: Path, mosquitto: BrokerProcess) -> Iterator[Path]:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    yield state


def test_fast_devices_wait_for_nobody_and_kills_use_no_update_twice(
    mosquitto: BrokerProcess, tmp_path: Path, aggregator: Path
) -> None:
    fast = [prepared(tmp_path, name, aggregator, mosquitto, FEW) for name in FAST]
    slow = prepared(tmp_path, SLOW, aggregator, mosquitto, MANY)
    with ServiceProcess(aggregator, mosquitto.url) as service, running(*fast, slow):
        wait_for(lambda: LocalEndpoint.read(aggregator / "api"), what="the service")
        with covey.connect(aggregator) as client:
            weights = encode_weights(np.array(WATCH.weights))
            client.publish(WATCH.manifest.to_bytes(), WATCH.graph, weights)
            campaign = client.start_rounds(REQUEST)

            # The fast ones make versions while the slow one trains; killed in it, it is ordered anew.
            wait_for(lambda: events(slow, "preparing-update"), what="the slow device's order")
            before = completed(client)
            wait_for(lambda: completed(client) >= before + 2, what="two buffers of fast devices")
            assert not events(slow, "update-ready"), "the slow device is too fast for this test"
            slow.kill()
            slow.start()
            wait_for(lambda: len(events(slow, "preparing-update")) == 2, what="the order again")

        # The aggregator is killed while it collects a buffer.
        hit = kill_in_a_buffer(service, aggregator)
        service.start()
        wait_for(lambda: LocalEndpoint.read(aggregator / "api"), what="the service again")
        with covey.connect(aggregator) as client:
            wait_for(lambda: one(client, hit).status != "running", what="the end of the buffer that was hit")
            assert one(client, hit).status == "completed", one(client, hit)

            # Nobody collects for a while; the slow one is killed between its training and its upload.
            assert not events(slow, "update-ready"), "the slow device is too fast for this test"
            client.pause_campaign(campaign.campaign)
            wait_for(lambda: events(slow, "update-ready"), 120, "the slow device's update")
            slow.kill()
            assert pending(slow) == 1
            slow.start()
            client.resume_campaign(campaign.campaign)
            wait_for(
                lambda: events(slow, "update-collected"), what="the buffer with the slow device's update"
            )
            (collected, *_) = events(slow, "update-collected")
            assert int(collected["staleness"]) >= 2
            assert len(events(slow, "preparing-update")) == 2, "it was trained once more"
            wait_for(
                lambda: one(client, collected["round"]).status != "running", 60, "the end of that buffer"
            )
            view = one(client, collected["round"])
            assert view.status == "completed" and SLOW in view.report.survivors
            assert view.report.metrics["examples"] == pytest.approx((2 * FEW + MANY) / 3, rel=0.02)

            # What waits for a campaign that is over is erased.
            client.cancel_campaign(campaign.campaign)
            wait_for(lambda: not any(pending(device) for device in fast), what="the erasure")
            versions = [each.version for each in client.versions()]
            assert versions == list(range(1, len(versions) + 1))
            assert len(versions) - 1 == completed(client)
        peak = max(device.peak_bytes() for device in (*fast, slow))
        with covey.open_operator(aggregator) as operator:
            model = operator.model("watch", versions[-1])
            assert np.isfinite(decode_weights(model.weights, model.manifest)).all()
        assert service.end(signal.SIGTERM) == 0
    assert "Traceback" not in service.log
    limit = 80 if find_spec("tflite_runtime") else 95
    assert peak < (limit + 2 * MANY * 2400 / 2**20) * 2**20, f"{peak / 2**20:.0f} MiB"
    for device in (*fast, slow):
        assert "Traceback" not in device.log.read_text()
        ledger = entries(device)
        assert len(ledger) == len(set(ledger)) == len(events(device, "input-masked"))
        assert len(ledger) <= len(events(device, "update-ready")), "an update was contributed twice"


def entries(device: Device) -> list[str]:
    """The rounds in a device's ledger, as its owner sees them."""
    done = subprocess.run(
        command("privacy", "--state", device.state, "--json"),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [entry["round_id"] for entry in json.loads(done.stdout)["entries"]]
