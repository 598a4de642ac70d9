"""Where the service finds its database: the state directory, COVEY_DATABASE_URL, or the settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from aggregator import main as covey
from aggregator.adapters.sql_schema import REVISION
from aggregator.cli import app
from aggregator.main import DATABASE_VARIABLE, NotInitialised
from aggregator.repository import OutdatedSchema, StorageUnavailable
from tests.contract.test_migrations import make_unnumbered
from tests.databases import PostgresProcess


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def settings_of(state: Path) -> dict[str, str]:
    settings: dict[str, str] = json.loads((state / "aggregator.json").read_text())
    return settings


def test_a_database_server_is_named_by_the_environment_and_remembered_without_its_password(
    state: Path, postgres: PostgresProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(postgres.new_database())
    secret = url.set(password="hunter2").render_as_string(hide_password=False)
    monkeypatch.setenv(DATABASE_VARIABLE, secret)
    covey.init(state)
    assert not (state / "aggregator.db").exists()
    assert settings_of(state)["database"] == url.render_as_string()
    assert "hunter2" not in (state / "aggregator.json").read_text()
    # From here on the settings are enough, where the server does not ask for a password.
    monkeypatch.delenv(DATABASE_VARIABLE)
    with covey.open_operator(state) as operator:
        assert operator.devices() == ()
    assert not (state / "aggregator.db").exists()


def test_a_password_that_others_can_read_is_not_used(state: Path) -> None:
    covey.init(state)
    path = state / "aggregator.json"
    path.write_text(json.dumps(settings_of(state) | {"database": "postgresql://covey:hunter2@127.0.0.1:1/x"}))
    path.chmod(0o640)
    with pytest.raises(NotInitialised, match="chmod 600") as caught, covey.open_operator(state):
        pass
    assert "hunter2" not in str(caught.value)
    path.chmod(0o600)
    with pytest.raises(StorageUnavailable, match="refused"), covey.open_operator(state):
        pass


@pytest.mark.parametrize("url", ["mysql://covey@db/covey", "not a url", "sqlite+pysqlcipher://:hunter2@/x"])
def test_a_url_that_cannot_be_used_makes_no_state_directory(
    state: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, url)
    with pytest.raises(StorageUnavailable) as caught:
        covey.init(state)
    assert "hunter2" not in str(caught.value)
    assert not state.exists()


def test_an_outdated_database_is_migrated_by_a_command(
    state: Path, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    covey.init(state)
    make_unnumbered(empty_database)
    monkeypatch.setenv(DATABASE_VARIABLE, empty_database)
    command = ["aggregator", "migrate", "--state", str(state)]
    with pytest.raises(OutdatedSchema, match="covey aggregator migrate"), covey.open_operator(state):
        pass
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.output) == (0, f"the database has schema {REVISION} now; it had 0000\n")
    with covey.open_operator(state):
        pass
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.output) == (
        0,
        f"the database has schema {REVISION} already: nothing to do\n",
    )


def test_a_database_that_is_gone_is_not_replaced_by_an_empty_one(state: Path) -> None:
    covey.init(state)
    (state / "aggregator.db").unlink()
    with pytest.raises(NotInitialised, match="restore it"), covey.open_operator(state):
        pass
    assert not (state / "aggregator.db").exists()
