"""Which databases are used, migrated and refused; on every kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from aggregator.adapters import migrations
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_migration import migrate
from aggregator.adapters.sql_schema import REVISION, metadata
from aggregator.records import Device, IssuedCertificate
from aggregator.repository import OutdatedSchema, UnknownSchema
from protocol.identity import create_ca, issue_certificate

DEVICE = Device("barn-1", b"certificate", 1.0)
NOW = 1_800_000_000


@contextmanager
def raw(url: str) -> Iterator[Connection]:
    """A connection without any of the repository's settings; it commits at the end."""
    engine: Engine = create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def make_unnumbered(url: str, device: Device = DEVICE) -> None:
    """Makes what the release before the migrations made: the tables of 0001, a number in `meta`, a device."""
    first = import_module("aggregator.adapters.migrations.versions.0001_first_release")
    with raw(url) as connection:
        with Operations.context(MigrationContext.configure(connection)):
            first.upgrade()
        connection.execute(text("INSERT INTO meta VALUES ('schema_version', '1')"))
        columns = "device_id, certificate, enrolled_at, online, client_version, runtime, models"
        row = ":device_id, :certificate, :enrolled_at, :online, :client_version, :runtime, '{}'"
        connection.execute(text(f"INSERT INTO devices ({columns}) VALUES ({row})"), vars(device))  # noqa: S608


def tables(url: str) -> set[str]:
    with raw(url) as connection:
        return set(inspect(connection).get_table_names())


def test_the_migrations_make_the_tables_that_the_code_uses(empty_database: str) -> None:
    assert migrate(empty_database) == (None, REVISION)
    assert migrate(empty_database) == (REVISION, REVISION)
    with raw(empty_database) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_there_is_one_line_of_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    numbers = [f"{number:04}" for number in range(len(scripts), 0, -1)]
    assert [script.revision for script in scripts] == numbers
    assert numbers[0] == REVISION


def test_an_empty_database_is_not_used_and_stays_empty(empty_database: str) -> None:
    with pytest.raises(OutdatedSchema, match=r"is empty.*covey aggregator init"):
        SqlRepository(empty_database)
    assert tables(empty_database) == set()


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ("9999", "install the Covey version that made it"),
        ("deadbeef", "not Covey's"),
    ],
)
def test_another_schema_is_refused_and_kept(empty_database: str, found: str, advice: str) -> None:
    migrate(empty_database)
    with raw(empty_database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found})
    for refused in (SqlRepository, migrate):
        with pytest.raises(UnknownSchema, match=f"schema {found}.*{advice}"):
            refused(empty_database)
    with raw(empty_database) as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == found


def test_the_database_of_something_else_is_refused(empty_database: str) -> None:
    with raw(empty_database) as connection:
        connection.exec_driver_sql("CREATE TABLE recipes (name TEXT)")
    for refused in (SqlRepository, migrate):
        with pytest.raises(UnknownSchema, match="not Covey's"):
            refused(empty_database)
    assert tables(empty_database) == {"recipes"}


def test_a_database_from_before_the_migrations_is_adopted_with_what_it_holds(empty_database: str) -> None:
    make_unnumbered(empty_database)
    with pytest.raises(OutdatedSchema, match="covey aggregator migrate"):
        SqlRepository(empty_database)
    assert migrate(empty_database) == ("0000", REVISION)
    assert migrate(empty_database) == (REVISION, REVISION)
    repository = SqlRepository(empty_database)
    with repository.read() as reader:
        assert reader.device("barn-1") == DEVICE
    repository.close()


def test_certificates_of_devices_in_use_are_entered(empty_database: str) -> None:
    key = Ed25519PrivateKey.generate()
    ca = create_ca(key, "barn", now=NOW, days=30, serial=1)
    device = issue_certificate(key, ca, "barn-1", key.public_key(), now=NOW, days=30, serial=0xABC)
    make_unnumbered(empty_database, replace(DEVICE, certificate=device))
    migrate(empty_database)
    repository = SqlRepository(empty_database)
    with repository.read() as reader:
        days = 30 * 86_400
        assert reader.certificates() == (IssuedCertificate("abc", "barn-1", NOW - 3600.0, float(NOW + days)),)
    repository.close()


def test_a_migration_that_fails_changes_nothing(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import command

    upgrade = command.upgrade

    def fail(config: Config, revision: str) -> None:
        upgrade(config, revision)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", fail)
        with pytest.raises(RuntimeError):
            migrate(empty_database)
    assert tables(empty_database) == set()
    assert migrate(empty_database) == (None, REVISION)
