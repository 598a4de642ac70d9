"""The values of local training refuse what cannot be trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.training import Examples, LocalUpdate, TrainingConfig
from models.examples import InvalidExamples


@pytest.mark.parametrize(
    "changes",
    [
        {"local_epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"proximal_mu": -0.1},
        {"proximal_mu": float("nan")},
    ],
)
def test_config_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainingConfig(**({"local_epochs": 1, "learning_rate": 0.1} | changes))


def test_config_seed_gives_the_same_order_every_time() -> None:
    config = TrainingConfig(local_epochs=1, learning_rate=0.1, seed=5)
    first, second = config.generator().permutation(50), config.generator().permutation(50)
    assert np.array_equal(first, second)


def test_update_norm_is_of_the_whole_delta() -> None:
    update = LocalUpdate(np.array([3.0, -4.0], np.float32), 1, 1.0, 0.5, 1.0)
    assert update.l2_norm == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((3, 2), np.float64), np.zeros(3, np.int32)),
        (np.zeros((3, 2), np.float32), np.zeros(3, np.int64)),
        (np.zeros((3, 2), np.float32), np.zeros(2, np.int32)),
        (np.zeros(3, np.float32), np.zeros(3, np.int32)),
        (np.full((3, 2), np.nan, np.float32), np.zeros(3, np.int32)),
        (np.zeros((3, 2), np.float32), np.array([0, -1, 0], np.int32)),
    ],
)
def test_examples_refuse_arrays_that_do_not_belong_together(x: Any, y: Any) -> None:
    with pytest.raises(InvalidExamples):
        Examples("device", x, y)


def test_examples_survive_their_file(tmp_path: Path) -> None:
    examples = Examples(
        "person-01", np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0, 1], np.int32)
    )
    path = tmp_path / "examples.npz"
    examples.save(path)
    again = Examples.load(path)
    assert again.name == "person-01"
    assert np.array_equal(again.x, examples.x)
    assert np.array_equal(again.y, examples.y)


def test_damaged_example_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.npz"
    Examples("p", np.zeros((40, 4), np.float32), np.zeros(40, np.int32)).save(path)
    whole = path.read_bytes()
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, name=np.array("p"), x=np.array([{}], dtype=object), y=np.zeros(1, np.int32))
    with pytest.raises(InvalidExamples):
        Examples.load(pickled)
    for damaged in (b"", whole[:10], whole[: len(whole) // 2], b"\x80\x04N."):
        path.write_bytes(damaged)
        with pytest.raises(InvalidExamples):
            Examples.load(path)


def test_pooling_concatenates() -> None:
    one = Examples("a", np.zeros((2, 3), np.float32), np.zeros(2, np.int32))
    two = Examples("b", np.ones((1, 3), np.float32), np.ones(1, np.int32))
    pooled = Examples.pooled("all", [one, two])
    assert (pooled.name, len(pooled), pooled.y.tolist()) == ("all", 3, [0, 0, 1])
    with pytest.raises(InvalidExamples):
        Examples.pooled("none", [])
