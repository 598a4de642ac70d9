"""Tests of the service: they need its packages, which the bare device install has not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aggregator_bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose uploads take several chunks."""
    bench = Bench(tmp_path, parameters=80_000)
    yield bench
    bench.close()
