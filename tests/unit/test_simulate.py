"""`covey simulate` with Covey's own engine: real training and encoding, a report that says what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

import typer
from rich.console import Console
from typer.testing import CliRunner

from aggregator.optimizers import Server
from deploy.demo.result import DemoResult
from deploy.simulate.cli import simulate
from deploy.simulate.options import Engine, PlanFile, SimulationError, SimulationOptions, read_plan
from deploy.simulate.population import populate
from deploy.simulate.run import measure, prepare, run_simulation
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import TrainingConfig
from models import zoo
from models.datasets import digits
from models.examples import Examples
from protocol.dp.parameters import PrivacyMode

PEOPLE = 5


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one NPZ file a device; devices write no name into theirs."""
    directory = tmp_path_factory.mktemp("barn")
    for number, form in enumerate(digits.load()[:PEOPLE]):
        np.savez(directory / f"device-{number}.npz", x=form.x[:40], y=form.y[:40])
    return directory


def options(data: Path, report: Path, **figures: Any) -> SimulationOptions:
    defaults: dict[str, Any] = {"model": "digits", "rounds": 2, "cohort": 4, "seed": 5}
    return SimulationOptions(Engine.LOCAL, PlanFile(**defaults | figures), str(data), 1, report)


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(simulate)
    return app


def test_a_round_is_the_mean_of_what_the_devices_trained(recordings: Path, tmp_path: Path) -> None:
    """Against the definition of federated averaging, written out; the ring adds quantization only."""
    asked = options(recordings, tmp_path, rounds=1, bits=32, clip_norm=50.0)
    result = measure(asked, quiet())
    task, population = prepare(asked)
    model = zoo.load("digits")
    trainer = TfliteTrainer(model.manifest, model.graph)
    config = TrainingConfig(task.training.local_epochs, task.training.learning_rate)
    deltas = [
        trainer.train(model.weights, device, config, np.random.default_rng([5, 1, index])).delta
        for index, device in enumerate(population.devices)
    ]
    expected = trainer.evaluate(model.weights + np.mean(deltas, axis=0), population.held_out[0])
    assert result.simulation is not None
    assert result.simulation.loss_per_round[1] == pytest.approx(expected.loss, abs=1e-4)
    assert result.simulation.loss_per_round[1] < result.simulation.loss_per_round[0]
    assert [person.person for person in result.people] == ["device-0"]


@pytest.mark.parametrize("mode", [PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED, PrivacyMode.LOCAL])
def test_noise_is_added_and_accounted_for(mode: PrivacyMode, recordings: Path, tmp_path: Path) -> None:
    silent = measure(options(recordings, tmp_path), quiet())
    asked = options(recordings, tmp_path, mode=mode, noise_multiplier=2.0, clip_norm=0.1)
    noisy, again = measure(asked, quiet()), measure(asked, quiet())
    assert silent.epsilon is None
    assert noisy.epsilon is not None
    assert 1 < noisy.epsilon < 4
    assert noisy.accuracy_per_round[0] == silent.accuracy_per_round[0]
    assert noisy.model_versions[-1].sha256 != silent.model_versions[-1].sha256
    assert noisy.model_versions == again.model_versions, "the same seed, the same simulation"


@pytest.mark.parametrize("server", list(Server))
def test_every_server_optimizer_runs(server: Server, recordings: Path, tmp_path: Path) -> None:
    found = measure(
        options(recordings, tmp_path, server_optimizer=server, server_learning_rate=0.05), quiet()
    )
    assert found.simulation is not None
    assert found.simulation.server_optimizer == f"{server}, learning rate 0.05"


def test_a_clip_norm_can_adapt(recordings: Path, tmp_path: Path) -> None:
    fixed = measure(options(recordings, tmp_path, clip_norm=0.01, rounds=3), quiet())
    moved = measure(options(recordings, tmp_path, clip_norm=0.01, rounds=3, adaptive_quantile=1.0), quiet())
    assert fixed.simulation is not None
    assert moved.simulation is not None
    gained = [
        found.loss_per_round[0] - found.loss_per_round[-1] for found in (fixed.simulation, moved.simulation)
    ]
    assert gained[1] > gained[0] * 1.05, "every update is clipped, so that the norm grows"


def test_the_report_is_that_of_a_real_run_and_says_what_it_is(recordings: Path, tmp_path: Path) -> None:
    result = run_simulation(options(recordings, tmp_path), quiet())
    assert DemoResult.model_validate_json((tmp_path / "result.json").read_text()) == result
    page = (tmp_path / "index.html").read_text()
    assert "simulation: no device took part" in page
    assert "<strong>Simulated</strong>" in page
    for not_measured in (">None<", "killed", "peak memory", "Alone", "own devices answered", "Broker"):
        assert not_measured not in page
    assert result.upload_bytes_per_round > zoo.load("digits").manifest.parameter_count * 18 / 8
    assert result.download_bytes_per_round > zoo.load("digits").manifest.weights.size


def test_training_that_diverges_ends_the_simulation(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="lower the learning rate"):
        measure(options(recordings, tmp_path, learning_rate=100.0, local_epochs=40), quiet())


def test_more_devices_than_people_share_a_persons_examples(recordings: Path) -> None:
    manifest = zoo.load("digits").manifest
    found = populate(str(recordings), manifest, devices=9, held_out=2, seed=1)
    assert len(found.devices) == 9
    assert [person.name for person in found.held_out] == ["device-0", "device-1"]
    for number in range(2, PEOPLE):
        whole = Examples.load(recordings / f"device-{number}.npz")
        parts = [part for part in found.devices if part.name.startswith(f"device-{number}-")]
        assert len(parts) == 3
        digests = [hashlib.sha256(row.tobytes()).digest() for part in parts for row in part.x]
        assert sorted(digests) == sorted(hashlib.sha256(row.tobytes()).digest() for row in whole.x)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cohort", "5"], "cannot give a cohort of 5"),
        (["--cohort", "5000"], "is split, which is not simulated"),
        (["--devices", "900", "--cohort", "4"], "too few for"),
        (["--held-out", "5"], "hold out fewer"),
        (["--data", "watch"], "the model digits takes (8, 8, 1)"),
        (["--data", "/nowhere"], "directory with an NPZ file"),
        (["--privacy", "example"], "not simulated"),
        (["--privacy", "distributed", "--bits", "8", "--noise-multiplier", "50"], "8 bits cannot hold"),
        (["--privacy", "central", "--noise-multiplier", "0"], "needs a noise_multiplier above 0"),
        (["--clip-norm", "0"], "clip_norm"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_trains(
    arguments: list[str], said: str, recordings: Path, tmp_path: Path, command: typer.Typer
) -> None:
    given = ["--model", "digits", "--data", str(recordings), "--report", str(tmp_path / "report"), *arguments]
    found = CliRunner().invoke(command, given)
    assert found.exit_code in (1, 2)
    assert said in " ".join(found.output.replace("│", "").split())
    assert not (tmp_path / "report").exists()


def test_tff_that_is_not_installed_is_said_how_to_install(
    recordings: Path, tmp_path: Path, command: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVEY_TFF_PYTHON", str(tmp_path / "python"))
    given = ["--engine", "tff", "--model", "digits", "--data", str(recordings)]
    found = CliRunner().invoke(command, given)
    assert found.exit_code == 1
    assert "make setup-parity" in found.output


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"mode": PrivacyMode.LOCAL}, "no mode local"),
        ({"mode": PrivacyMode.DISTRIBUTED, "bits": 24}, "at most 22 bits"),
        ({"mode": PrivacyMode.DISTRIBUTED, "adaptive_quantile": 0.5}, "central mode only"),
    ],
)
def test_what_tff_cannot_do_is_refused(
    figures: dict[str, Any], said: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("COVEY_TFF_PYTHON", str(interpreter))
    asked = options(recordings, tmp_path, **figures)
    with pytest.raises(SimulationError, match=said):
        prepare(SimulationOptions(Engine.TFF, asked.plan, asked.data, 1, tmp_path))


def test_a_forecast_is_a_plan_and_a_slip_of_the_pen_is_none(tmp_path: Path) -> None:
    forecast = {
        "epsilon_total": 4.0,
        "mode": "distributed",
        "noise_multiplier": 1.5,
        "cohort": 4,
        "unit": "device",
    }
    (tmp_path / "forecast.json").write_text(json.dumps(forecast))
    found = read_plan(tmp_path / "forecast.json")
    assert (found.mode, found.noise_multiplier, found.cohort) == (PrivacyMode.DISTRIBUTED, 1.5, 4)
    assert found.updated(cohort=3, rounds=None).cohort == 3
    for wrong in ('{"noise_mutliplier": 1}', '{"rounds": 0}', "[", '{"epsilon_total": 1, "bits": "many"}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(SimulationError, match=r"wrong\.json"):
            read_plan(tmp_path / "wrong.json")
