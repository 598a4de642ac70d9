"""Every kind of database that the repository runs on; one PostgreSQL server serves the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.adapters.sql_engine import url_of_file
from tests.databases import PostgresProcess, find_postgresql, postgresql

_NO_POSTGRESQL = pytest.mark.skipif(find_postgresql() is None, reason="PostgreSQL is not installed")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresProcess]:
    """A running server."""
    programs = find_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql(programs) as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=_NO_POSTGRESQL)])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables; the test runs once with each kind."""
    if request.param == "sqlite":
        return url_of_file(tmp_path / "aggregator.db")
    server: PostgresProcess = request.getfixturevalue("postgres")
    return server.new_database()
