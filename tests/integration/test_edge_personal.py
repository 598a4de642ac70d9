"""A real device process that personalises the versions that it gets, while its owner looks on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from deploy.broker import BrokerProcess
from edge_client.adapters.personal import PersonalFiles
from edge_client.policy import DevicePolicy
from models import zoo
from models.weights import encode_weights
from tests.edge_broker import Device, Fleet, Hub, command, running, wait_for
from tests.unit.test_edge_personal import person

WATCH = zoo.load("watch")
WEIGHTS = encode_weights(np.array(WATCH.weights))


def answer(*arguments: object) -> dict[str, object]:
    done = subprocess.run(
        command(*arguments, "--json"), capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_new_version_is_personalised_by_the_daemon(broker: BrokerProcess, tmp_path: Path) -> None:
    fleet, data = Fleet(tmp_path), tmp_path / "recordings"
    data.mkdir()
    person().save(data / "some.npz")
    np.save(tmp_path / "x.npy", person().x[:3])
    policy = DevicePolicy(personal_epochs=15, personal_learning_rate=0.1)
    device = Device(fleet.enrolled("device-0", policy), data, broker)

    def personal() -> list[int]:
        records = PersonalFiles(device.state / "personal").records()
        return [record.version for record in records if record.kept]

    with Hub(broker) as hub, running(device):
        hub.publish(WATCH.manifest, WATCH.graph, WEIGHTS, fleet.operator)
        wait_for(lambda: personal() == [1], what="the first personal model")
        assert answer("predict", "--state", device.state, "--input", tmp_path / "x.npy")["personal"]
        weights = encode_weights((WATCH.weights * np.float32(0.9)).astype(np.float32))
        hub.publish(WATCH.manifest.next_version(weights), WATCH.graph, weights, fleet.operator)
        wait_for(lambda: personal() == [2], what="the second personal model")
        # The owner may do the same at any time.
        (status,) = answer("status", "--state", device.state)["personal"]  # type: ignore[misc]
        assert (status["version"], status["kept"]) == (2, True)
        again = answer("personalise", "--state", device.state, "--data", data, "--epochs", 15)
        assert (again["version"], again["kept"]) == (2, True)
        device.kill()
        hub.statuses.clear()  # what it said before is no news
        device.start()
        wait_for(lambda: hub.serving("device-0") == {"watch": 2}, what="the device after a kill")
        assert answer("predict", "--state", device.state, "--input", tmp_path / "x.npy")["personal"]
        assert device.stop() == 0
    log = device.log.read_text()
    # Once for each version, also across a kill.
    assert log.count(" personalised ") == 2 and "Traceback" not in log
