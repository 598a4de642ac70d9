"""The load benchmark accounts for every check-in; how fast is no matter here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from benchmarks import load
from deploy.broker import find_mosquitto


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_every_check_in_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "IDLE_SECONDS", 0.1)
    target = tmp_path / "load.json"
    load.main(["--devices", "20", "--rate", "60", "--seconds", "1", "--json", str(target)])
    figures = json.loads(target.read_text())
    assert (figures["devices"], figures["sent"], figures["lost"]) == (20, 60, 0)
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["worst_ms"]
    assert 10 < figures["idle_mb"] < 150
