"""A whole real round from outside: what the metrics count, what the logs say, and what they never say."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator.access.roles import Role
from aggregator.settings import CampaignRequest
from aggregator.web.local import LocalEndpoint
from deploy.broker import BrokerProcess
from protocol.codec import decode_from_device, decode_to_device
from protocol.columns import Column
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_devices import SimulatedDevice
from tests.aggregator_process import ServiceProcess, SimulatedFleet
from tests.edge_broker import wait_for

DEVICES = 5


def scrape(endpoint: LocalEndpoint, token: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {token}"}, timeout=120)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(
        "text/plain; version=0.0.4"
    )
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


class Secrets:
    """Bytes that no log may hold, in the forms in which they could be written."""

    def __init__(self) -> None:
        self.raw: set[bytes] = set()

    def add(self, *values: bytes) -> None:
        self.raw |= {value for value in values if len(value) >= 16}

    def of_message(self, message: Any) -> None:
        """Every byte string of a message: shares, ciphertexts, keys, signatures."""
        if isinstance(message, bytes | bytearray):
            self.add(bytes(message))
        elif isinstance(message, Column):
            self.of_message(message.by_peer())
        elif isinstance(message, BaseModel):
            self.of_message(dict(message))
        elif isinstance(message, dict):
            for value in message.values():
                self.of_message(value)
        elif isinstance(message, list | tuple):
            for value in message:
                self.of_message(value)

    def found_in(self, log: str) -> list[str]:
        def forms(raw: bytes) -> Iterator[str]:
            yield raw.hex()
            yield base64.b64encode(raw).decode().rstrip("=")
            yield base64.urlsafe_b64encode(raw).decode().rstrip("=")
            yield repr(raw)[2:-1]
            yield raw.decode(errors="replace")

        # A long value that is cut is a leak, too.
        return [form for raw in self.raw for form in forms(raw) if form[:24] in log]


def test_a_round_is_counted_and_its_log_holds_no_secret(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    state = tmp_path / "state"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    secrets = Secrets()
    fleet = SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=DEVICES, parameters=1000)
    original = SimulatedDevice.receive

    def spying(device: SimulatedDevice, frame: bytes) -> list[tuple[str, bytes]]:
        before = decode_to_device(frame)[0]
        answers = original(device, frame)
        if before.type != "invitation":
            secrets.of_message(before)
        for _, answer in answers:
            message, body = decode_from_device(answer)
            secrets.of_message(message)
            secrets.add(bytes(body[:64]))
        if device.state is not None:
            secrets.of_message({k: v for k, v in vars(device.state).items() if isinstance(v, bytes)})
        return answers

    with covey.open_operator(state) as operator:
        viewer, _ = operator.create_token(role=Role.VIEWER, label="prometheus", seconds=3600, created_by="t")
    service = ServiceProcess(state, mosquitto.url)
    service.options = ("--log", "json", "--verbose")
    with pytest.MonkeyPatch.context() as patch, fleet, service:
        patch.setattr(SimulatedDevice, "receive", spying)
        wait_for(lambda: covey.is_running(state) and LocalEndpoint.read(state / "api"), what="the service")
        endpoint = LocalEndpoint.read(state / "api")
        assert endpoint is not None
        campaign = covey.start_rounds(
            state,
            CampaignRequest(
                "toy", rounds=1, cohort=DEVICES, privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=1.0
            ),
        )

        def finished() -> bool:
            with covey.open_operator(state) as operator:
                return operator.campaign(campaign.campaign_id).status == "finished"

        wait_for(finished, what="the round")
        assert not fleet.errors
        found = scrape(endpoint, viewer)
        assert httpx.get(f"{endpoint.url}/metrics", timeout=120).status_code == 401
        assert httpx.get(f"{endpoint.url}/nowhere/{'x' * 50}", timeout=120).status_code == 404
        again = scrape(endpoint, viewer)
        service.end(signal.SIGTERM)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("covey_rounds_started_total", model="toy") == 1
    assert value("covey_rounds_ended_total", model="toy", status="completed", code="") == 1
    assert value("covey_round_seconds_count", status="completed") == 1
    for phase in ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"):
        assert value("covey_phase_answered_total", phase=phase) == DEVICES
        assert value("covey_phase_expected_total", phase=phase) == DEVICES
    assert value("covey_devices", state="online") == DEVICES
    assert value("covey_devices", state="enrolled") == DEVICES
    assert value("covey_model_version", model="toy") == 2
    assert value("covey_messages_received_total", channel="chunk") >= DEVICES
    assert value("covey_messages_received_total", channel="status") >= DEVICES
    assert value("covey_delivery_seconds_count") >= 5 * DEVICES
    assert value("covey_epsilon_spent", delta="1e-05") > 1
    assert value("covey_ready", what="broker") == value("covey_ready", what="storage") == 1
    assert value("covey_broker_connections_total") == 1
    assert value("process_resident_memory_bytes") > 2**20
    assert (
        again[
            "covey_http_request_seconds_count",
            frozenset({("method", "GET"), ("route", "unknown"), ("status", "404")}),
        ]
        == 1
    )
    # Nothing that grows with the fleet or with time is a label.
    text = repr(sorted((name, sorted(labels)) for name, labels in again))
    assert "device-" not in text and campaign.campaign_id not in text and "xxx" not in text

    lines = [json.loads(line) for line in service.log.splitlines()]
    assert all({"event", "level", "logger", "timestamp"} <= line.keys() for line in lines)
    begun = next(line for line in lines if "started: " in line["event"])
    rounds = [line for line in lines if line.get("round") == begun["round"]]
    assert begun["campaign"] == campaign.campaign_id and len(begun["round"]) == 32
    assert sum("over, 5 of 5 answered" in line["event"] for line in rounds) == 5
    assert any("completed" in line["event"] for line in rounds)

    for path in [*(state / "keys").iterdir(), state / "admin-token"]:
        secrets.add(*path.read_bytes().splitlines())
    secrets.add(viewer.encode(), endpoint.token.encode())
    for device in fleet.devices.values():
        secrets.add(device.identity.private_bytes_raw())
    assert len(secrets.raw) > 20 * DEVICES
    assert secrets.found_in(service.log) == []
    # The test can fail: what is written would be found.
    assert secrets.found_in(service.log + endpoint.token) != []
    assert secrets.found_in(
        service.log + next(iter(fleet.devices.values())).identity.private_bytes_raw().hex()
    )


def test_what_a_device_writes_begins_no_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    from aggregator.telemetry import logs

    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    try:
        for form in logs.LogForm:
            logs.start(form, logging.INFO)
            logging.getLogger("x").warning("dropped: %s", "a\n2026-11-24 [error] forged \x1b[2J" + "y" * 5000)
            (line,) = capsys.readouterr().err.splitlines()
            assert "forged" in line and "\x1b[2J" not in line and len(line) < 3000
            try:
                private = "in-a-variable"
                raise ValueError(f"no {len(private)}")
            except ValueError:
                logging.getLogger("x").exception("stumbled")
            told = capsys.readouterr().err
            assert "ValueError: no 13" in told and "in-a-variable" not in told
    finally:
        root.handlers[:] = kept
        root.setLevel(level)
