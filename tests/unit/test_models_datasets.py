"""The packaged data: complete, split by person or form, and read only when it is the reviewed file."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from models.datasets import digits, source, watch
from models.datasets.source import DataSetUnavailable
from models.examples import Examples

needs_watch = pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="seglearn is absent")
needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is absent"
)


@needs_watch
def test_watch_is_ten_people_with_all_seven_exercises() -> None:
    people = watch.load()
    assert [person.name for person in people] == [f"person-{number:02d}" for number in range(1, 11)]
    assert sum(map(len, people)) == 4677
    for person in people:
        assert person.x.shape[1:] == (100, 6)
        assert set(person.y.tolist()) == set(range(7))
    # Gravity: the mean length of the acceleration is about 1 g.
    acceleration = np.linalg.norm(people[0].x[:, :, :3], axis=2)
    assert 0.8 < acceleration.mean() < 1.4


def test_windows_overlap_by_half_and_leave_the_rest() -> None:
    recording = np.arange(275, dtype=np.float32)[:, None] * np.ones(6, np.float32)
    windows = watch.windows_of(recording)
    assert windows.shape == (4, 100, 6)
    assert windows[:, 0, 0].tolist() == [0, 50, 100, 150]
    assert windows[3, 99, 5] == 249
    assert watch.windows_of(recording[:99]).shape == (0, 100, 6)


@needs_digits
def test_digits_are_fourteen_forms_with_all_ten_digits() -> None:
    forms = digits.load()
    assert [form.name for form in forms] == [f"form-{number:02d}" for number in range(1, 15)]
    assert [len(form) for form in forms[:3]] == [130, 126, 130]
    assert sum(map(len, forms)) == 1797
    for form in forms:
        assert set(form.y.tolist()) == set(range(10))
        assert (form.x.min(), form.x.max()) == (0.0, 16.0)


@needs_digits
def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    pooled = Examples.pooled("all", digits.load())
    assert np.array_equal(pooled.x[..., 0], original.images)
    assert np.array_equal(pooled.y, original.target)


@pytest.mark.parametrize(
    ("load", "module"),
    [
        pytest.param(watch.load, watch, marks=needs_watch),
        pytest.param(digits.load, digits, marks=needs_digits),
    ],
)
def test_a_file_with_another_digest_is_not_read(
    load: Callable[[], object], module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the bytes were used")

    monkeypatch.setattr(module, "SHA256", "0" * 64)
    monkeypatch.setattr(np, "load", forbidden)
    with pytest.raises(DataSetUnavailable, match="reviewed"):
        load()


def test_a_missing_package_or_file_is_named() -> None:
    with pytest.raises(DataSetUnavailable, match="no_such_package"):
        source.read_packaged("no_such_package", "data.npy", "0" * 64)
    with pytest.raises(DataSetUnavailable, match=r"nothing\.npy"):
        source.read_packaged("numpy", "nothing.npy", "0" * 64)


@needs_watch
@needs_digits
def test_loading_imports_neither_the_packages_nor_tensorflow() -> None:
    code = (
        "import sys\nfrom models.datasets import digits, watch\ndigits.load(); watch.load()\n"
        "print(*sorted({'seglearn', 'sklearn', 'pandas', 'scipy', 'tensorflow', 'keras'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
