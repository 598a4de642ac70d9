"""A client that is installed anew: what the device gave is still counted, and still limits it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edge_client.adapters.store import DeviceStore
from edge_client.durable import SaveContribution
from edge_client.policy import DevicePolicy, check_epsilon
from edge_client.session_state import restore
from protocol.dp.parameters import PrivacyMode
from protocol.round_encoding import contribution_event, round_encoding
from tests.edge_broker import Fleet
from tests.edge_fleet import plan
from tests.unit.test_edge_store import committed_round

ROOT = Path(__file__).parents[2]


def installed(directory: Path) -> Path:
    """One installation of the client: its packages, and nothing else."""
    for package in ("edge_client", "models", "protocol"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def run(installation: Path, *arguments: object) -> str:
    """A command of this installation; it sees no other one."""
    program = "import edge_client.main as m, sys; print(m.__file__, file=sys.stderr); sys.exit(m.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(installation)},
        cwd=installation,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(installation)), done.stderr
    return done.stdout


def test_the_ledger_survives_a_reinstall(tmp_path: Path) -> None:
    fleet, state, bundle = Fleet(tmp_path), tmp_path / "state", tmp_path / "bundle.json"

    def enrol(client: Path) -> None:
        run(client, "init", "--state", state, "--device-id", "barn-1")
        bundle.write_bytes(fleet.bundle((state / "device.csr").read_bytes(), "barn-1").to_bytes())
        run(client, "enroll", "--state", state, "--bundle", bundle)

    first = installed(tmp_path / "first")
    enrol(first)
    now, (_, contribution, _) = int(time.time()), committed_round()
    noisy = plan().privacy.model_copy(update={"mode": PrivacyMode.DISTRIBUTED, "noise_multiplier": 1.0})
    signed = plan(privacy=noisy)
    event = contribution_event(signed, round_encoding(signed, bytes(32), 100))
    with DeviceStore.open(state) as store:
        for number in range(3):
            entry = contribution.entry.model_copy(
                update={"round_id": f"{number:032x}", "at": now, "event": event}
            )
            store.apply([SaveContribution(entry)])
    before = json.loads(run(first, "privacy", "--state", state, "--json"))
    assert len(before["entries"]) == 3 and before["epsilon"] > 0

    shutil.rmtree(first)
    second = installed(tmp_path / "second")
    enrol(second)
    after = json.loads(run(second, "privacy", "--state", state, "--json"))
    assert after == before
    # What it spent counts against the next round.
    with DeviceStore.open(state) as store:
        memory = store.load()
    policy = DevicePolicy(maximum_epsilon=before["epsilon"])
    refusal = check_epsilon(policy, event, restore(memory).history, now)
    assert refusal is not None and refusal.code == "epsilon-exceeded"
