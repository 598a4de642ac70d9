"""Real brokers for integration tests; each test gets its own, empty one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.broker import BrokerKind, BrokerProcess, find_mosquitto


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest) -> Iterator[BrokerProcess]:
    """A running broker; the test runs once with each kind."""
    kind: BrokerKind = request.param
    if kind == "amqtt":
        pytest.importorskip("amqtt")
    elif find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with BrokerProcess(kind) as process:
        yield process


@pytest.fixture
def mosquitto() -> Iterator[BrokerProcess]:
    """A running mosquitto, for what only MQTT 5 or stored sessions can show."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with BrokerProcess("mosquitto") as process:
        yield process
