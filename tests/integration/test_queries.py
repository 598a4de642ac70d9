"""`covey query` with the real service, a real broker and real device processes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from aggregator import main as covey
from deploy.broker import BrokerProcess
from edge_client.adapters.readings import save_fields
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.fields import DeclaredFields, field_source
from edge_client.policy import DevicePolicy
from protocol.codec import decode_from_device
from protocol.dp.parameters import PrivacyMode
from protocol.messages import BlobChunk
from protocol.plan import MeanQuestion, QueryTask
from protocol.queries import answer_vector
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, running, wait_for

VALUES = {
    "barn-1": 21.515625,
    "barn-2": 34.703125,
    "barn-3": 47.828125,
    "barn-4": 612.59375,
    "barn-5": 3.890625,
}
"""Distinctive in every form of a float."""
LOW, HIGH = 0.0, 80.0
TRUE_MEAN = sum(min(max(value, LOW), HIGH) for value in VALUES.values()) / len(VALUES)
POLICY = DevicePolicy(
    minimum_cohort=3, minimum_survivors=3, privacy_modes=frozenset(PrivacyMode) - {PrivacyMode.EXAMPLE},
    maximum_epsilon=None,
)  # fmt: skip


@contextmanager
def everything_said(broker: BrokerProcess) -> Iterator[list[tuple[str, bytes]]]:
    """Every message of every topic, as the broker sees them."""
    said: list[tuple[str, bytes]] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="eavesdropper")
    client.on_connect = lambda each, *_: each.subscribe("#", 1)
    client.on_message = lambda _, __, message: said.append((message.topic, bytes(message.payload)))
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        yield said
    finally:
        client.disconnect()
        client.loop_stop()


def device(directory: Path, aggregator: Path, name: str, broker: BrokerProcess) -> Device:
    """An enrolled device whose owner declares two fields, with no data to train on."""
    state = directory / name
    enrol(state, covey.enrol(aggregator, initialise(state, name)))
    set_policy(state, POLICY)
    source = directory / f"{name}-sensor"
    source.write_text("inf" if name == "barn-1" else "20")
    fields = {
        "battery-temperature": field_source({"kind": "constant", "value": VALUES[name]}),
        "broken": field_source({"kind": "file", "path": str(source)}),
    }
    save_fields(state, DeclaredFields(fields=fields))
    data = directory / f"{name}-data"
    data.mkdir()
    return Device(state, data, broker)


def query(state: Path, *arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-c", "from aggregator.cli import main; main()", "query", *map(str, arguments)]
    done = subprocess.run(
        [*command, "--state", str(state)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def forms_of(value: float) -> list[bytes]:
    """The bytes by which a value could be recognised, in the clear or normalised."""
    task = QueryTask(field="x", low=LOW, high=HIGH, question=MeanQuestion())
    normalised = float(answer_vector(task, value)[0])
    forms = [repr(value).encode()]
    forms += [struct.pack(order + "d", number) for order in "<>" for number in (value, normalised)]
    # A clipped value is 1.0, which everybody may write.
    return [form for form in forms if form not in (struct.pack("<d", 1.0), struct.pack(">d", 1.0))]


def check_nothing_leaked(said: list[tuple[str, bytes]], state: Path, radius: int) -> None:
    # The eavesdropper may hear a little later than the aggregator.
    wait_for(lambda: sum(topic.endswith("/up/chunk") for topic, _ in said[:]) >= len(VALUES))
    stored = b"".join(path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file())
    wire = b"".join(payload for _, payload in said)
    task = QueryTask(field="x", low=LOW, high=HIGH, question=MeanQuestion())
    uploads = []
    for topic, payload in said:
        if topic.endswith("/up/chunk"):
            message, body = decode_from_device(payload)
            assert isinstance(message, BlobChunk)
            uploads.append(bytes(body))
    for value in VALUES.values():
        for form in forms_of(value):
            assert form not in wire and form not in stored, value
        steps = float(answer_vector(task, value)[0]) * radius
        # The masked element is uniform in 2^32: it equals one of these by chance once in 10^7 runs.
        plain = {struct.pack("<I", int(steps // 1 + step) % 2**32) for step in (-1, 0, 1, 2)}
        assert not plain.intersection(uploads)


def answer_of(out: str) -> dict[str, Any]:
    report = json.loads(out)["report"]
    answer: dict[str, Any] = report["answer"]
    return answer


@pytest.mark.e2e
def test_queries_of_a_fleet(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    devices = [device(tmp_path, state, name, mosquitto) for name in VALUES]
    bounds = ("--low", LOW, "--high", HIGH, "--cohort", 5, "--gather", 120)
    with everything_said(mosquitto) as said, ServiceProcess(state, mosquitto.url), running(*devices):
        wait_for(lambda: covey.is_running(state), what="the service")
        # Without noise: exact to the resolution of the ring, and still nobody's value is seen.
        code, out, errors = query(
            state, "mean", "battery-temperature", *bounds, "--privacy", "none", "--json"
        )
        assert code == 0, errors
        assert "completed" in errors  # the progress
        plain = answer_of(out)
        assert plain["participants"] == 5 and plain["epsilon"] is None
        assert plain["figures"]["low"] <= TRUE_MEAN <= plain["figures"]["high"]
        assert plain["figures"]["estimate"] == pytest.approx(TRUE_MEAN, abs=HIGH / 2**20)
        check_nothing_leaked(said, state, 2**22)

        # With noise from every device: within six standard errors, but for once in 500 million runs.
        code, out, errors = query(
            state, "mean", "battery-temperature", *bounds, "--noise-multiplier", 0.5, "--json"
        )
        assert code == 0, errors
        noisy = answer_of(out)
        error = noisy["figures"]["standard_error"]
        assert 3 < error < 6 and abs(noisy["figures"]["estimate"] - TRUE_MEAN) < 6 * error
        assert noisy["epsilon"] > 1

        # A value that is infinite is refused and counted; the others answer.
        code, out, errors = query(state, "sum", "broken", *bounds, "--privacy", "none")
        assert code == 0, errors
        assert "80.0000" in out and "4 of 5 invited; declined: 1 value-not-finite" in out

        # A field that nobody declares.
        code, out, errors = query(state, "mean", "blood-pressure", *bounds)
        assert code == 3 and "unknown-field" in errors

    code, out, _ = query(state, "list")
    assert code == 0 and "mean of battery-temperature" in out and "sum of broken" in out
