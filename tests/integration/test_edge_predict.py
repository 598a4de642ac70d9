"""A real device process that answers other programs, while versions come and the process is killed."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from deploy.broker import BrokerProcess
from edge_client.local import Prediction, PredictionFailed, SocketPredictor
from models import zoo
from models.weights import encode_weights
from tests.edge_broker import Device, Fleet, Hub, command, running, wait_for
from tests.edge_fleet import PERMISSIVE

WATCH = zoo.load("watch")
WINDOW = np.zeros(WATCH.manifest.input.shape, np.float32)


def code_of(path: Path) -> str:
    """Why the socket has no answer; "" when it has one."""
    try:
        with SocketPredictor(path) as predictor:
            predictor.predict(WINDOW)
    except PredictionFailed as error:
        return error.code
    return ""


def test_programs_are_answered_while_versions_come(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    fleet, path = Fleet(tmp_path), tmp_path / "run" / "predict.sock"
    state = fleet.enrolled("device-0", PERMISSIVE)
    (state / "edge.toml").write_text(
        f'[predict]\nsocket = "{path}"\n[predict.mqtt]\nbroker = "{mosquitto.url}"\ntopic = "house/covey"\n'
    )
    device = Device(state, fleet.data("device-0", WATCH.manifest), mosquitto)
    found: list[Prediction] = []
    troubles: list[Exception] = []
    stopping = threading.Event()

    def ask() -> None:
        try:
            with SocketPredictor(path) as predictor:
                while not stopping.is_set():
                    found.append(predictor.predict(WINDOW))
                    time.sleep(0.005)
        except PredictionFailed as error:
            troubles.append(error)

    with Hub(mosquitto) as hub, running(device):
        wait_for(path.exists, what="the socket")
        assert code_of(path) == "no-model"
        manifest, weights = WATCH.manifest, encode_weights(np.array(WATCH.weights))
        hub.publish(manifest, WATCH.graph, weights, fleet.operator)
        wait_for(lambda: code_of(path) == "", what="the first version")
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            weights = encode_weights((np.frombuffer(weights, "<f4") * np.float32(0.9)).astype(np.float32))
            manifest = manifest.next_version(weights)
            hub.publish(manifest, WATCH.graph, weights, fleet.operator)
            wait_for(lambda: found and found[-1].version == manifest.version, what="the next version")  # noqa: B023
        stopping.set()
        for thread in threads:
            thread.join(60)
        assert troubles == [] and len(found) > 50 and {answer.version for answer in found} == {1, 2, 3}

        answers: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.on_message = lambda _, __, message: answers.put(json.loads(message.payload))
        client.connect(mosquitto.host, mosquitto.port)
        client.loop_start()
        client.subscribe("house/covey/answer", 1)
        request = json.dumps({"id": "a", "inputs": WINDOW.tolist()})
        for payload in (request, "{", request.replace('"a"', '"b"'), "x" * 2_000_000, request):
            client.publish("house/covey/request", payload, qos=1)
        heard = [answers.get(timeout=120) for _ in range(5)]
        client.disconnect()
        client.loop_stop()
        codes = [answer["error"]["code"] if "error" in answer else answer["id"] for answer in heard]  # type: ignore[index]
        assert codes == ["a", "bad-request", "b", "too-large", "a"] and heard[0]["version"] == 3

        # A kill leaves the socket behind; the next process takes its place.
        device.kill()
        assert path.exists() and code_of(path) == "unavailable"
        device.start()
        wait_for(lambda: code_of(path) == "", what="the socket after a kill")
        assert device.stop() == 0
        assert not path.exists()
    assert "Traceback" not in device.log.read_text()


def test_a_socket_that_cannot_be_made_stops_the_start_with_a_word(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("device-0", PERMISSIVE)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    (state / "edge.toml").write_text(f'[predict]\nsocket = "{taken}"\n')
    data = fleet.data("device-0", WATCH.manifest)
    argv = command("run", "--state", state, "--broker", mosquitto.url, "--data", data)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and f"{taken} is no socket" in done.stderr, done.stderr
    assert taken.read_text() == "mine" and "Traceback" not in done.stderr
