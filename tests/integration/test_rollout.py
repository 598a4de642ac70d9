"""Versions on their way to real devices: in waves, back again, through crashes and replays."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from aggregator import main as covey
from aggregator.evaluations import EvaluationRequest
from aggregator.operations import Operator
from aggregator.rollout.waves import ordered
from aggregator.rollout_operations import RolloutRequest, RolloutView
from deploy.broker import BrokerProcess
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from models import zoo
from protocol import topics
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, Fleet, running, wait_for

pytestmark = pytest.mark.e2e

WATCH = zoo.load("watch")
NAMES = tuple(f"device-{number}" for number in range(4))
POLICY = DevicePolicy(minimum_cohort=2, minimum_survivors=2, privacy_modes=frozenset(PrivacyMode))


@dataclass
class World:
    """A service process, four device processes, and the operator's view of them."""

    operator: Operator
    service: ServiceProcess
    broker: BrokerProcess
    devices: dict[str, Device]

    def publish(self, weights: np.ndarray) -> int:
        """Publishes the model with these weights, whatever they are; returns the number."""
        data = weights.astype("<f4").tobytes()
        manifest = WATCH.manifest.next_version(data)
        return self.operator.publish(manifest.to_bytes(), WATCH.graph, data).version

    def serving(self) -> dict[str, int | None]:
        """What the devices say that they serve."""
        return {d.device_id: d.models.get("watch") for d in self.operator.devices()}

    def all_serve(self, version: int) -> bool:
        return set(self.serving().values()) == {version}

    def start(self, version: int, *percent: float, **changes: object) -> str:
        request = RolloutRequest("watch", version, percent or (25.0, 100.0), **changes)  # type: ignore[arg-type]
        return self.operator.start_rollout(request).record.rollout_id

    def wait(self, rollout_id: str, status: str) -> RolloutView:
        """Waits until a rollout has this status."""
        wait_for(lambda: self.operator.rollout(rollout_id).record.status == status, what=status)
        return self.operator.rollout(rollout_id)

    def first_wave(self, rollout_id: str) -> str:
        """The one device of the first wave, worked out from what is recorded."""
        view = self.operator.rollout(rollout_id)
        return ordered(view.record.pool, view.settings.seed)[0]


@contextmanager
def world(broker: BrokerProcess, path: Path) -> Iterator[World]:
    state, fleet = path / "aggregator", Fleet(path)
    covey.init(state, fleet="orchard", broker=broker.url)
    settings = json.loads((state / "aggregator.json").read_text())
    (state / "aggregator.json").write_text(json.dumps(settings | {"promotion": "manual"}))
    with ExitStack() as stack:
        operator = stack.enter_context(covey.open_operator(state))
        devices = {}
        for name in NAMES:
            own = path / name
            enrol(own, operator.enrol(initialise(own, name)))
            set_policy(own, POLICY)
            devices[name] = Device(own, fleet.data(name, WATCH.manifest), broker)
        service = stack.enter_context(ServiceProcess(state, broker.url))
        stack.enter_context(running(*devices.values()))
        found = World(operator, service, broker, devices)
        wait_for(lambda: all(d.online for d in operator.devices()), what="the devices")
        yield found
    assert "Traceback" not in "".join(device.log.read_text() for device in devices.values())


@pytest.fixture
def place(mosquitto: BrokerProcess, tmp_path: Path) -> Iterator[World]:
    """A fleet that has version 1."""
    with world(mosquitto, tmp_path) as found:
        first = found.publish(WATCH.weights)
        rollout = found.start(first, 100.0)
        found.wait(rollout, "completed")
        wait_for(lambda: found.all_serve(1), what="the first version")
        yield found


def retained(broker: BrokerProcess, topic: str) -> bytes:
    """The retained message of a topic."""
    got: list[bytes] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="looker")
    client.on_message = lambda _, __, message: got.append(bytes(message.payload))
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe(topic, 1)
    wait_for(lambda: got, what="the retained message")
    client.disconnect()
    client.loop_stop()
    return got[0]


def repeat(broker: BrokerProcess, topic: str, payload: bytes) -> None:
    """Says again what was said before, as a broker could that lies."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="liar")
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.publish(topic, payload, qos=1, retain=True).wait_for_publish(60)
    client.disconnect()
    client.loop_stop()


def test_a_good_version_reaches_everybody_through_a_crash_and_comes_back(place: World) -> None:
    topic = topics.model("watch")
    first = retained(place.broker, topic)
    number = place.publish(WATCH.weights * np.float32(1.01))
    assert number == 2 and place.operator.version("watch", 2).stage == "candidate"
    rollout = place.start(2, soak_seconds=4.0, gate=("errors<0.5",))
    canary = place.first_wave(rollout)
    wait_for(lambda: place.serving()[canary] == 2, what="the canary")
    assert sorted(v or 0 for v in place.serving().values()) == [1, 1, 1, 2]
    place.service.end(signal.SIGKILL)
    place.service.start()
    view = place.wait(rollout, "completed")
    assert [step.wave for step in view.progress.steps] == [0, 1, 1]
    wait_for(lambda: place.all_serve(2), what="the second version")
    assert place.operator.fleet_version("watch") == 2

    # A device that is away for the way back finds it when it returns.
    away = next(name for name in NAMES if name != canary)
    place.devices[away].kill()
    second = retained(place.broker, topic)
    place.operator.turn_rollout(rollout, "rollback", "wrong labels")
    wait_for(lambda: set(place.serving().values()) == {1, 2}, what="the others")
    place.devices[away].start()
    wait_for(lambda: place.all_serve(1), what="the device that was away")

    # Nobody can bring the second version back by saying it again, nor say the first one in its place.
    for payload in (second, first):
        repeat(place.broker, topic, payload)
    wait_for(
        lambda: all(d.log.read_text().count("assignment-not-newer") >= 2 for d in place.devices.values()),
        what="the refusals",
    )
    assert place.all_serve(1)


def test_bad_versions_stay_with_the_first_wave_and_go_back(place: World) -> None:
    # It runs, and is bad at it: the devices' own evaluation says so.
    place.publish(np.zeros_like(WATCH.weights))
    rollout = place.start(2, gate=("accuracy>=0.99",))
    canary = place.first_wave(rollout)
    wait_for(lambda: place.serving()[canary] == 2, what="the canary")
    wait_for(
        lambda: "evaluation" in getattr(place.operator.rollout(rollout).progress.state, "waits_for", ""),
        what="what it waits for",
    )
    request = EvaluationRequest("watch", version=2, cohort=4, minimum=3, privacy=PrivacyMode.NONE)
    place.operator.start_evaluation(request)
    view = place.wait(rollout, "rolled-back")
    assert "the gate accuracy>=0.99 failed" in view.progress.steps[-1].detail
    assert [step.wave for step in view.progress.steps] == [0, 0]
    wait_for(lambda: place.all_serve(1), what="the way back")
    assert place.operator.version("watch", 2).stage == "withdrawn"
    # Everybody evaluated it; only the first wave ever served it.
    served = [name for name in NAMES if " version-good model=watch version=2" in log(place, name)]
    assert served == [canary]

    # It does not run at all: the device finds out by itself, and says so.
    number = place.publish(np.full_like(WATCH.weights, np.nan))
    rollout = place.start(number, gate=("errors<0.01",))
    canary = place.first_wave(rollout)
    view = place.wait(rollout, "rolled-back")
    assert "errors" in view.progress.steps[-1].detail and place.all_serve(1)
    failure = place.operator.device(canary).failures["watch"]
    assert (failure.version, failure.code) == (number, "model-unusable") and failure.detail

    # A pin holds a device where it is while the fleet goes on.
    place.operator.pin("watch", 1, device="device-0")
    number = place.publish(WATCH.weights * np.float32(1.02))
    place.wait(place.start(number, 100.0), "completed")
    others = {name: number for name in NAMES if name != "device-0"}
    wait_for(lambda: place.serving() == {"device-0": 1, **others}, what="the others")
    place.operator.unpin("watch", device="device-0")
    wait_for(lambda: place.all_serve(number), what="the device that was pinned")


def test_a_candidate_is_evaluated_by_all_while_another_version_rolls_out(place: World) -> None:
    """Evaluations, rollouts, pins and groups meet: each device serves what it is to have, and no other."""
    operator = place.operator
    rolled, candidate = (place.publish(WATCH.weights * np.float32(factor)) for factor in (1.01, 1.02))
    operator.pin("watch", 1, device="device-0")
    operator.label("device-1", ("barn",))
    operator.pin("watch", 1, group="barn")
    # Its gate takes any figure, so it waits for nothing but an evaluation of its own version.
    rollout = place.start(rolled, 50.0, 100.0, gate=("accuracy>=0",))
    canary = place.first_wave(rollout)
    assert canary in ("device-2", "device-3")
    (other,) = {"device-2", "device-3"} - {canary}

    def evaluate(version: int) -> None:
        request = EvaluationRequest(
            "watch", version=version, cohort=4, minimum=4, min_survivors=4, privacy=PrivacyMode.NONE
        )
        asked = operator.start_evaluation(request).campaign_id
        wait_for(lambda: operator.campaign(asked).status == "finished", 60, f"an evaluation of {version}")
        (found,) = operator.evaluations("watch", version)
        assert found.participants == 4, "pinned or not, all have examples"

    evaluate(candidate)
    wait_for(lambda: place.serving()[canary] == rolled, 60, "the canary")
    wait_for(
        lambda: "an evaluation" in getattr(operator.rollout(rollout).progress.state, "waits_for", ""),
        60,
        "what the rollout waits for",
    )
    assert place.serving() == {"device-0": 1, "device-1": 1, canary: rolled, other: 1}
    assert operator.version("watch", candidate).stage == "candidate"

    evaluate(rolled)
    place.wait(rollout, "completed")
    mixed = {"device-0": 1, "device-1": 1, canary: rolled, other: rolled}
    wait_for(lambda: place.serving() == mixed, 60, "the second wave")
    operator.unpin("watch", device="device-0")
    operator.unpin("watch", group="barn")
    wait_for(lambda: place.all_serve(rolled), 60, "those that were pinned")
    for name in NAMES:
        served = [int(line.split("version=")[1].split()[0]) for line in goods(place, name)]
        assert served == [1, rolled], "it went to and fro, or answered with what it only evaluated"


def goods(place: World, name: str) -> list[str]:
    """What a device noted of the versions that it came to serve."""
    return [line for line in log(place, name).splitlines() if " version-good model=watch " in line]


def log(place: World, name: str) -> str:
    return place.devices[name].log.read_text()
