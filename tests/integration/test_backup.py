"""The commands of `docs/how-to/back-up.md`, run as they are written there, and what they bring back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from aggregator import main as covey
from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from protocol.dp.parameters import PrivacyMode
from tests.aggregator_process import ServiceProcess, SimulatedFleet
from tests.databases import find_postgresql, postgresql
from tests.edge_broker import wait_for

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "back-up.md"


def commands(heading: str) -> str:
    """The first block of commands below a heading of the page."""
    below = PAGE.read_text().split(f"## {heading}\n", 1)[1]
    found = re.search(r"```\n(.*?)```", below, re.S)
    assert found is not None
    return found[1]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[tuple[str, str] | None]:
    """URLs of a database and of an empty one to restore into; None for SQLite."""
    if request.param == "sqlite":
        if shutil.which("sqlite3") is None:
            pytest.skip("sqlite3 is not installed")
        yield None
        return
    programs = find_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql(programs) as server:
        yield server.new_database(), server.new_database()


def told(state: Path) -> tuple[object, ...]:
    """What must come back."""
    with covey.open_operator(state) as operator, operator.repository.read() as reader:
        return (
            reader.devices(),
            reader.versions(),
            reader.rounds(),
            reader.ledger(),
            reader.transcript_head(),
            reader.tokens(),
            operator.authority.fleet,
        )


def test_a_fleet_comes_back(
    mosquitto: BrokerProcess,
    database: tuple[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, backup = tmp_path / "state", tmp_path / "backup"
    if database is not None:
        monkeypatch.setenv("COVEY_DATABASE_URL", database[0])
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    request = CampaignRequest(
        "toy", rounds=1, cohort=3, privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=1.0, epsilon_limit=1e6
    )
    environment = {**os.environ, "STATE": str(state), "BACKUP": str(backup)}
    if database is not None:
        # libpq knows no driver in a URL.
        environment["COVEY_DATABASE_URL"] = database[0].replace("+psycopg", "")
        environment["NEW_DATABASE_URL"] = database[1].replace("+psycopg", "")
    kind = "SQLite" if database is None else "PostgreSQL"

    def run(heading: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-euc", commands(heading)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    with (
        SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=3, parameters=500),
        ServiceProcess(state, mosquitto.url),
    ):
        campaign = covey.start_rounds(state, request)

        def settled() -> bool:
            # Its version becomes stable a moment after the round, in a transaction of its own.
            with covey.open_operator(state) as operator:
                stable = all(version.stage == "stable" for version in operator.versions())
                return stable and operator.campaign(campaign.campaign_id).status == "finished"

        wait_for(settled, what="the round and its version")
        # While it runs.
        run(f"Back up: {kind}")
    before = told(state)
    assert before[3] and len(before[1]) == 2  # type: ignore[arg-type]
    assert backup.stat().st_mode & 0o077 == 0

    # The machine is gone, and with it all that was there.
    state.rename(tmp_path / "gone")
    run(f"Restore: {kind}")
    if database is not None:
        monkeypatch.setenv("COVEY_DATABASE_URL", database[1])
    after = told(state)
    # Presence is telemetry: devices say again that they are there.
    assert [each.device_id for each in after[0]] == [each.device_id for each in before[0]]  # type: ignore[attr-defined]
    assert [each.certificate for each in after[0]] == [each.certificate for each in before[0]]  # type: ignore[attr-defined]
    assert after[1:] == before[1:]
    for path in (state / "keys").iterdir():
        assert path.stat().st_mode & 0o077 == 0
    service = ServiceProcess(state, mosquitto.url)
    with service:
        wait_for(
            lambda: "connected to the broker" in service.log.split("aggregator of")[-1], 60, "the service"
        )
