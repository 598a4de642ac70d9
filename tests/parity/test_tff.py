"""Covey against TensorFlow Federated, which runs in an environment of its own: `make parity`."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("dp_accounting")
pytest.importorskip("sklearn")

from aggregator.optimizers import FedAdam, FedAvg
from aggregator.privacy.references import tff_parameters
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import TrainingConfig
from models import zoo
from models.examples import Examples
from protocol import ring
from protocol.dp.mechanism import decode, derive_encoding, encode
from protocol.dp.parameters import PrivacyMode, PrivacyParameters

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("COVEY_TFF_PYTHON", ROOT / ".venv-tff" / "bin" / "python"))

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not PYTHON.exists(), reason="TFF's environment is absent: make parity"),
]

CLIENTS, ROUNDS, EPOCHS, RATE, SERVER_RATE = 6, 4, 3, 0.2, 0.02
BETA1, BETA2, TAU = 0.9, 0.99, 1e-3
Vector = NDArray[np.float32]
Oracle = dict[str, NDArray[np.float32]]


def tff(command: str, given: Path, result: Path) -> None:
    """Runs one command of the engine. Its worker outlives it, so that the whole group is ended."""
    log = result.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, ROOT / "tests" / "parity" / "tff_engine.py", command, given, result],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def people() -> list[Examples]:
    """Clients with one batch of digits each, so that no order of examples matters."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    size = zoo.load("digits").manifest.train_batch_size
    return [
        Examples(
            f"client-{index}",
            images[start : start + size].reshape(-1, 8, 8, 1).astype(np.float32),
            labels[start : start + size].astype(np.int32),
        )
        for index in range(CLIENTS)
        for start in [index * 130]
    ]


@pytest.fixture(scope="module")
def oracle(
    people: list[Examples], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, NDArray[np.float32]]:
    """TFF's weights after every round, by algorithm."""
    directory = tmp_path_factory.mktemp("tff")
    model = zoo.load("digits")
    (mean,), (std,) = model.manifest.input.mean, model.manifest.input.std
    np.savez(
        directory / "task.npz",
        x=np.stack([(person.x - mean) / std for person in people]).astype(np.float32),
        y=np.stack([person.y for person in people]),
        weights=model.weights,
        epochs=EPOCHS,
        rounds=ROUNDS,
        rate=RATE,
        server_rate=SERVER_RATE,
    )
    tff("train", directory / "task.npz", directory / "result.npz")
    with np.load(directory / "result.npz") as result:
        return {name: result[name] for name in result.files}


@functools.cache
def trainer() -> TfliteTrainer:
    model = zoo.load("digits")
    return TfliteTrainer(model.manifest, model.graph)


def mean_update(
    weights: NDArray[np.float32], people: list[Examples], *, encoded: bool
) -> NDArray[np.float32]:
    """One round on the devices' real trainer; the mean is plain, or goes through encoding and ring."""
    config = TrainingConfig(EPOCHS, RATE)
    updates = [trainer().train(weights, person, config, config.generator()).delta for person in people]
    if not encoded:
        return np.mean(updates, axis=0, dtype=np.float64).astype(np.float32)
    privacy = PrivacyParameters(
        mode=PrivacyMode.NONE, clip_norm=8.0, noise_multiplier=0.0, delta=1e-5, bits=32
    )
    params = derive_encoding(
        privacy,
        dimension=weights.size,
        minimum_survivors=CLIENTS,
        maximum_clients=CLIENTS,
        rotation_seed=bytes(32),
    )
    total = np.zeros(params.length, np.uint32)
    for index, update in enumerate(updates):
        assert np.linalg.norm(update) < privacy.clip_norm
        ring.add(total, encode(update, {}, params, index.to_bytes(32, "big")), params.bits, out=total)
    return decode(total, CLIENTS, params)[0]


@pytest.mark.parametrize(("encoded", "tolerance"), [(False, 5e-7), (True, 4e-6)])
def test_fedavg_gives_the_weights_of_tff(
    oracle: Oracle, people: list[Examples], encoded: bool, tolerance: float
) -> None:
    """Four rounds, each from where TFF stood; a quantization step of the ring is 8 / 2^22 = 2 10^-6."""
    algorithm = FedAvg()
    start = zoo.load("digits").weights
    for previous, expected in zip((start, *oracle["fedavg"]), oracle["fedavg"], strict=False):
        state = algorithm.apply(algorithm.init(previous), mean_update(previous, people, encoded=encoded))
        np.testing.assert_allclose(state.parameters, expected, atol=tolerance, rtol=0)


def test_four_rounds_of_fedavg_in_a_row_stay_near_those_of_tff(
    oracle: Oracle, people: list[Examples]
) -> None:
    """Where an activation is all but 0, the last bit decides whether a rectifier or a maximum switches: one
    such switch moved a weight by 3 10^-4 in the second round, and each round amplifies it."""
    algorithm = FedAvg()
    start = zoo.load("digits").weights
    state = algorithm.init(start)
    for _ in oracle["fedavg"]:
        state = algorithm.apply(state, mean_update(state.parameters, people, encoded=False))
    moved = np.linalg.norm(oracle["fedavg"][-1] - start)
    assert np.linalg.norm(state.parameters - oracle["fedavg"][-1]) < 0.02 * moved
    assert moved > 0.5, "it did train"


@pytest.mark.parametrize(("encoded", "tolerance"), [(False, 5e-6), (True, 2e-5)])
def test_fedadam_gives_the_weights_of_tff(
    oracle: Oracle, people: list[Examples], encoded: bool, tolerance: float
) -> None:
    """TFF's Adam corrects the bias of its moments and starts them at 0 (Kingma, Ba 2015); ours is the FedAdam
    of Reddi et al. 2021, which does neither. The correction is a learning rate for each round."""
    start = zoo.load("digits").weights
    state = FedAdam(SERVER_RATE, BETA1, TAU, BETA2).init(start)
    state = replace(state, second_moment=np.zeros_like(start))
    steps = zip((start, *oracle["fedadam"]), oracle["fedadam"], strict=False)
    for number, (previous, expected) in enumerate(steps, start=1):
        if encoded:
            state = replace(state, parameters=previous)
        rate = SERVER_RATE * math.sqrt(1 - BETA2**number) / (1 - BETA1**number)
        algorithm = FedAdam(rate, BETA1, TAU, BETA2)
        state = algorithm.apply(state, mean_update(state.parameters, people, encoded=encoded))
        np.testing.assert_allclose(state.parameters, expected, atol=tolerance, rtol=0)


CASES: list[dict[str, Any]] = [
    {"clients": clients, "noise_multiplier": z, "bits": bits, "dimension": dimension, "clip_norm": clip_norm}
    for clients, z, bits, dimension, clip_norm in [
        (100, 1.0, 16, 50_000, 0.1),
        (100, 1.0, 20, 50_000, 0.1),
        (100, 4.0, 16, 50_000, 0.1),
        (1000, 1.0, 16, 50_000, 0.1),
        (1000, 0.5, 20, 1_000_000, 1.0),
        (20, 1.0, 12, 10_000, 1.0),
    ]
]


@pytest.fixture(scope="module")
def tff_table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    directory = tmp_path_factory.mktemp("parameters")
    (directory / "cases.json").write_text(json.dumps(CASES))
    tff("parameters", directory / "cases.json", directory / "result.json")
    rows: list[dict[str, float]] = json.loads((directory / "result.json").read_text())
    return rows


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_parameters_of_ddp_secure_aggregator(tff_table: list[dict[str, float]], index: int) -> None:
    """`covey privacy plan` says what TFF would choose; docs/explanation/privacy.md derives the difference."""
    case, theirs = CASES[index], tff_table[index]
    privacy = PrivacyParameters(
        mode=PrivacyMode.DISTRIBUTED,
        clip_norm=case["clip_norm"],
        noise_multiplier=case["noise_multiplier"],
        delta=1e-5,
        bits=case["bits"],
    )
    ours = derive_encoding(
        privacy,
        dimension=case["dimension"],
        minimum_survivors=case["clients"],
        maximum_clients=case["clients"],
        rotation_seed=bytes(32),
    )
    predicted = tff_parameters(ours)
    assert predicted.scale == pytest.approx(theirs["scale"], rel=1e-4)
    assert predicted.scaled_l2 == pytest.approx(theirs["scaled_l2"], rel=1e-3)  # its float32
    assert predicted.local_stddev == pytest.approx(theirs["local_stddev"], rel=1e-4)
    # TFF's true noise multiplier is below the one it was given, since rounding adds to the sensitivity.
    true_multiplier = theirs["local_stddev"] * math.sqrt(case["clients"]) / theirs["scaled_l2"]
    assert true_multiplier < case["noise_multiplier"]
    assert math.sqrt(case["clients"] * ours.local_variance / ours.norm_bound_squared) == pytest.approx(
        case["noise_multiplier"]
    )
