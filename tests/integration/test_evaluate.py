"""`covey evaluate` with the real service, a real broker, and real devices that run the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aggregator import main as covey
from deploy.broker import BrokerProcess
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from models.examples import Examples
from models.weights import encode_weights
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, running, wait_for

WATCH = zoo.load("watch")
NAMES = ("barn-1", "barn-2", "barn-3")
POLICY = DevicePolicy(
    minimum_cohort=3, minimum_survivors=3, privacy_modes=frozenset({PrivacyMode.NONE}), maximum_epsilon=None
)


def examples(seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(40, *WATCH.manifest.input.shape)).astype(np.float32)
    return Examples("some", x, generator.integers(0, len(WATCH.manifest.labels), 40).astype(np.int32))


def test_devices_evaluate_a_version(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    weights = encode_weights(np.array(WATCH.weights))
    trainer = TfliteTrainer(WATCH.manifest, WATCH.graph)
    devices, truth = [], []
    for seed, name in enumerate(NAMES):
        place, data = tmp_path / name, tmp_path / f"{name}-data"
        enrol(place, covey.enrol(state, initialise(place, name)))
        set_policy(place, POLICY)
        data.mkdir()
        examples(seed).save(data / "recordings.npz")
        truth.append(trainer.evaluate(np.array(WATCH.weights), examples(seed)))
        devices.append(Device(place, data, mosquitto))
    with ServiceProcess(state, mosquitto.url), running(*devices):
        wait_for(lambda: covey.is_running(state), what="the service")
        with covey.connect(state) as client:
            client.publish(WATCH.manifest.to_bytes(), WATCH.graph, weights)
        command = [sys.executable, "-c", "from aggregator.cli import main; main()", "evaluate", "watch"]
        options = ["--version", "1", "--cohort", "3", "--gather", "120", "--privacy", "none", "--json"]
        done = subprocess.run(
            [*command, *options, "--state", str(state)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COLUMNS": "120"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        with covey.connect(state) as client:
            assert client.versions()[-1].version == 1  # nothing was trained
            (kept,) = client.evaluations("watch", 1)
    assert found["participants"] == kept.participants == 3
    accuracy, loss = np.mean([[each.accuracy, each.loss] for each in truth], axis=0)
    assert found["metrics"]["accuracy"]["mean"] == pytest.approx(accuracy, abs=1e-4)
    assert kept.metrics["loss"].mean == pytest.approx(loss, abs=1e-3)
