"""A Raspberry Pi's processor learns what this one learns: the aarch64 wheels, emulated."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models import zoo
from models.datasets import digits, watch
from models.examples import Examples
from tests.arm64_machine import MMDEBSTRAP, QEMU, Arm64Machine, machine
from tests.arm64_training import STEPS, trained

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        QEMU is None or MMDEBSTRAP is None or shutil.which("apt-get") is None,
        reason="qemu-user-static or mmdebstrap is not installed",
    ),
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="the wheels compared are those of Python 3.11"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("seglearn") is None or importlib.util.find_spec("sklearn") is None,
        reason="the data sets are absent",
    ),
]


@pytest.fixture(scope="module")
def pi() -> Arm64Machine:
    return machine()


@pytest.mark.parametrize("model", zoo.NAMES)
def test_ten_steps_give_the_same_weights_on_aarch64(pi: Arm64Machine, model: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    ten_batches(model).save(data / "recordings.npz")
    here = trained(model, data)
    printed = pi.run(Path(__file__).parents[1] / "arm64_training.py", model, data, tmp_path / "there.npy")
    there: NDArray[np.float32] = np.load(tmp_path / "there.npy")
    assert printed.split() == ["aarch64"]
    assert np.linalg.norm(here) > 0.1
    assert np.abs(there - here).max() <= 1e-5


def ten_batches(model: str) -> Examples:
    """Real examples, as many as ten steps take."""
    pooled = Examples.pooled("device", {"watch": watch, "digits": digits}[model].load())
    count = STEPS * zoo.load(model).manifest.train_batch_size
    chosen = np.random.default_rng(0).permutation(len(pooled))[:count]
    return Examples("device", pooled.x[chosen], pooled.y[chosen])
