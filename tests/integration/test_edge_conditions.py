"""A real device process whose owner sets conditions, and whose service manager listens."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

from deploy.broker import BrokerProcess
from edge_client.policy import DevicePolicy
from models import zoo
from models.weights import encode_weights
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.identity import SignedDocument
from protocol.messages import Invitation, Refusal
from protocol.plan import PLAN_KIND, CohortParameters, Plan, TrainingParameters, TrainTask
from tests.edge_broker import FLEET, Device, Fleet, Hub, command, running, wait_for

WATCH = zoo.load("watch")


def invitation(fleet: Fleet) -> Invitation:
    now = int(time.time())
    plan = Plan(
        fleet=FLEET,
        round_id=secrets.token_hex(16),
        task=TrainTask(
            model="watch",
            base_version=1,
            manifest_sha256=WATCH.manifest.sha256(),
            training=TrainingParameters(local_epochs=1, learning_rate=0.05),
        ),
        privacy=PrivacyParameters(
            mode=PrivacyMode.DISTRIBUTED, clip_norm=1.0, noise_multiplier=0.01, delta=1e-5, bits=24
        ),
        cohort=CohortParameters(size=4, minimum=3, minimum_survivors=2),
        issued_at=now,
        expires_at=now + 600,
    )
    return Invitation(plan=SignedDocument.create(fleet.operator, PLAN_KIND, plan.to_bytes()))


def test_a_device_says_how_it_is_and_refuses_what_its_owner_does(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path)
    policy = DevicePolicy(minimum_cohort=3, minimum_survivors=2, maximum_epsilon=None)
    state = fleet.enrolled("device-0", policy)
    (state / "edge.toml").write_text("[conditions]\nminimum_free_memory = 1048576\n")
    device = Device(state, fleet.data("device-0", WATCH.manifest), mosquitto)
    with Hub(mosquitto) as hub, running(device):
        hub.publish(WATCH.manifest, WATCH.graph, encode_weights(WATCH.weights), fleet.operator)
        wait_for(lambda: hub.serving("device-0") == {"watch": 1}, what="the version")
        status = hub.last_status("device-0")
        assert status is not None and status.conditions.free_memory and status.conditions.load is not None
        hub.send("device-0", invitation(fleet))
        _, answer, _ = hub.heard.get(timeout=120)
        assert isinstance(answer, Refusal) and answer.code == "conditions"
        assert "it trains from 1048576 MiB" in answer.detail
        assert device.stop() == 0


def test_the_service_is_ready_without_a_broker_and_says_so(tmp_path: Path) -> None:
    """READY is not for the network: else systemd would end a healthy device for a broker that is away."""
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("device-0", DevicePolicy())
    nobody = SimpleNamespace(url="mqtt://127.0.0.1:1")
    device = Device(state, fleet.data("device-0", WATCH.manifest), nobody)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        device.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with running(device):
            assert systemd.recv(1024) == b"READY=1"
            assert systemd.recv(1024) == b"WATCHDOG=1"
            assert next_but_alive(systemd) == b"STATUS=no broker: going on without; waiting for a round"
            assert device.stop() == 0
        assert next_but_alive(systemd) == b"STOPPING=1"


def next_but_alive(systemd: socket.socket) -> bytes:
    """What comes next, besides the signs of life, which take their own time."""
    while (heard := systemd.recv(1024)) == b"WATCHDOG=1":
        pass
    return heard


def test_a_misspelt_limit_stops_the_start_and_names_itself(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    state = fleet.enrolled("device-0", DevicePolicy())
    data = fleet.data("device-0", WATCH.manifest)
    (state / "edge.toml").write_text("[conditions]\nmaximum_temprature = 70\n")
    for arguments in (("run", "--broker", mosquitto.url, "--data", data), ("config",)):
        done = subprocess.run(
            command(*arguments, "--state", state), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1
        assert done.stderr.strip().endswith(
            "edge.toml: conditions.maximum_temprature: Extra inputs are not permitted"
        )
