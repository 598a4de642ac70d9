"""Mode `example` end to end: the real service, a real broker, and device processes that train by DP-SGD."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import main as covey
from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from models.weights import decode_weights, encode_weights
from protocol.dp.accounting import spend
from protocol.dp.example import example_event, mechanism_of
from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution, PrivacyMode
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, command, running, wait_for

WATCH = zoo.load("watch")
HIDING = ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0, sampling_probability=0.2)
EPOCHS = 2
MODES = frozenset({PrivacyMode.EXAMPLE, PrivacyMode.DISTRIBUTED})
REQUEST = CampaignRequest(
    "watch",
    rounds=1,
    cohort=5,
    minimum=3,
    min_survivors=3,
    local_epochs=EPOCHS,
    learning_rate=0.05,
    privacy=PrivacyMode.EXAMPLE,
    noise_multiplier=HIDING.noise_multiplier,
    example_clip_norm=HIDING.clip_norm,
    sampling_probability=HIDING.sampling_probability,
    gather_seconds=120.0,
)


def cost(rounds: int) -> float:
    """Epsilon of one example after so many rounds, at the device's delta."""
    mechanism = mechanism_of(HIDING, NoiseDistribution.SKELLAM, WATCH.manifest.parameter_count)
    event = example_event(mechanism, HIDING.steps(EPOCHS))
    return spend({event: rounds}, DevicePolicy().delta).epsilon


def device(directory: Path, aggregator: Path, name: str, policy: DevicePolicy, mqtt: BrokerProcess) -> Device:
    state, data = directory / name, directory / f"{name}-data"
    enrol(state, covey.enrol(aggregator, initialise(state, name)))
    set_policy(state, policy)
    data.mkdir()
    chance = np.random.default_rng(int(name[-1]))
    x = chance.normal(size=(40, *WATCH.manifest.input.shape)).astype(np.float32)
    np.savez(data / "people.npz", x=x, y=chance.integers(0, len(WATCH.manifest.labels), 40).astype(np.int32))
    return Device(state, data, mqtt)


def privacy(of: Device) -> dict[str, Any]:
    """What the device's owner is told."""
    done = subprocess.run(
        command("privacy", "--state", of.state, "--json"),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def campaign(state: Path) -> RoundView:
    """Runs one round to its end."""
    started = covey.start_rounds(state, REQUEST)
    views: list[RoundView] = []

    def ended() -> bool:
        with covey.open_operator(state) as operator:
            views[:] = operator.rounds(started.campaign_id)
        return bool(views) and views[-1].record.status in {"completed", "aborted"}

    wait_for(ended, 120, "the end of the round")
    return views[-1]


@pytest.mark.e2e
def test_a_fleet_trains_and_hides_examples_within_every_owners_limit(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    state, files = tmp_path / "aggregator", tmp_path / "model"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    files.mkdir()
    (files / "manifest.json").write_bytes(WATCH.manifest.to_bytes())
    (files / "model.tflite").write_bytes(WATCH.graph)
    (files / "weights.bin").write_bytes(encode_weights(np.array(WATCH.weights)))
    covey.publish(state, files)
    # Two rounds are more than one of the owners allows; and one never agreed to this mode.
    lavish = DevicePolicy(
        minimum_cohort=3, minimum_survivors=3, privacy_modes=MODES, maximum_example_epsilon=2 * cost(2)
    )
    thrifty = lavish.model_copy(update={"maximum_example_epsilon": (cost(1) + cost(2)) / 2})
    silent = lavish.model_copy(update={"privacy_modes": MODES - {PrivacyMode.EXAMPLE}})
    policies = [lavish, lavish, lavish, thrifty, silent]
    devices = [
        device(tmp_path, state, f"barn-{n}", policy, mosquitto) for n, policy in enumerate(policies, start=1)
    ]
    with ServiceProcess(state, mosquitto.url), running(*devices):
        wait_for(lambda: covey.is_running(state), what="the service")
        first = campaign(state)
        assert first.record.status == "completed", first.record
        assert first.report.survivors == ("barn-1", "barn-2", "barn-3", "barn-4")
        assert set(first.report.declined) == {"barn-5"}
        assert first.report.declined["barn-5"].startswith("privacy-mode")
        second = campaign(state)
        assert second.report.survivors == ("barn-1", "barn-2", "barn-3")
        assert second.report.declined["barn-4"].startswith("epsilon-exceeded")

    # Only the number of examples is told without noise, and no epsilon of a device is claimed.
    assert set(first.report.metrics) <= {"examples"} and first.report.epsilon is None
    with covey.open_operator(state) as operator:
        models = [operator.model("watch", version) for version in (1, 2, 3)]
    weights = [decode_weights(model.weights, model.manifest) for model in models]
    for before, after in pairwise(weights):
        assert 0 < np.linalg.norm(after - before) < 100
    for rounds, each in zip((2, 2, 2, 1), devices, strict=False):
        told = privacy(each)
        assert len(told["entries"]) == told["one_example"]["contributions"] == rounds
        assert told["one_example"]["epsilon"] == pytest.approx(cost(rounds))
        assert told["epsilon"] == 0
    assert privacy(devices[4])["entries"] == []
