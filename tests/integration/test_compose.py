"""What `deploy/compose.yaml` starts, started here: its own commands, with paths and names of this machine."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("yaml")

import yaml

from aggregator import main as covey
from deploy.broker import find_mosquitto, free_port
from edge_client.device_setup import enrol, initialise
from tests.databases import find_postgresql, postgresql
from tests.edge_broker import Device, running, wait_for
from tests.fleet_broker import FleetBroker

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose.yaml"


@pytest.mark.e2e
@pytest.mark.skipif(find_mosquitto() is None or find_postgresql() is None, reason="needs both servers")
def test_the_three_processes_work_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    state, broker_port, api_port = tmp_path / "state", free_port(), free_port()
    # What differs here: where the volume is, that the containers are one machine, and which ports are free.
    changes = {
        "/state": str(state),
        "mqtts://broker:8883": f"mqtts://localhost:{broker_port}",
        ":8883": f":{broker_port}",
        ":8443": f":{api_port}",
        "${COVEY_FLEET:-covey}": "orchard",
    }

    def here(text: str) -> str:
        text = re.sub(r"\$\{COVEY_BROKER:\?[^}]*\}", "localhost", text)
        for old, new in changes.items():
            text = text.replace(old, new)
        return text

    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "covey").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from aggregator.cli import main; main()' \"$@\"\n"
    )
    (programs / "covey").chmod(0o755)
    found = find_postgresql()
    assert found is not None
    with postgresql(found) as server:
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "COVEY_DATABASE_URL": server.new_database(),
        }
        init = services["init"]
        for _ in range(2):  # `up` starts it every time
            subprocess.run(
                [*init["entrypoint"], *map(here, init["command"])], env=environment, check=True, timeout=120
            )
        monkeypatch.setenv("COVEY_DATABASE_URL", environment["COVEY_DATABASE_URL"])
        edge = tmp_path / "barn-1"
        enrol(edge, covey.enrol(state, initialise(edge, "barn-1")))
        data = tmp_path / "data"
        data.mkdir()
        assert services["broker"]["entrypoint"] == ["/bin/sh"]
        assert services["broker"]["command"] == ["start"]
        log = tmp_path / "aggregator.log"
        with FleetBroker(state, broker_port) as broker, log.open("wb") as file:
            service = subprocess.Popen(
                [programs / "covey", *map(here, services["aggregator"]["command"])],
                env=environment,
                stderr=file,
            )
            try:
                context = ssl.create_default_context(cafile=str(state / "ca.pem"))

                def answers(path: str) -> bool:
                    url = f"https://localhost:{api_port}/api/v1/{path}"
                    try:
                        return bool(urllib.request.urlopen(url, context=context, timeout=120).status == 200)
                    except (urllib.error.URLError, OSError):
                        return False

                wait_for(lambda: answers("ready"), what=f"readiness: {log.read_text()}")
                # The container's own check.
                check = services["aggregator"]["healthcheck"]["test"]
                assert check[:2] == ["CMD", "python"]
                subprocess.run([sys.executable, *map(here, check[2:])], check=True, timeout=120)
                with running(Device(edge, data, broker)):  # type: ignore[arg-type]

                    def online() -> bool:
                        return any(device.online for device in covey.devices(state))

                    wait_for(online, what="the device")
            finally:
                service.send_signal(signal.SIGTERM)
                assert service.wait(timeout=120) == 0
