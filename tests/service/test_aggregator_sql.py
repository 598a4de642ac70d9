"""What only SQLite can show: trouble with the file, durability settings."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import url_of_file
from aggregator.records import AuditEntry, Campaign, Device, LogEntry, Round, RoundEnding
from aggregator.repository import StorageUnavailable
from tests.databases import repository_at, sqlite_repository

ROUND = Round("a" * 32, "c" * 32, 1, "watch", 1, b"plan", b"seed", ("barn-1",), 3.0)
SECRET = os.urandom(5000)


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "aggregator.db"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StorageUnavailable, match="not a database"):
        sqlite_repository(path)


def test_a_missing_directory_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="unable to open"):
        repository_at(url_of_file(tmp_path / "nowhere" / "aggregator.db"))


def test_a_full_disk_is_unavailable_and_changes_nothing(tmp_path: Path) -> None:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    try:
        with repository.write() as writer:
            pages = writer._connection.exec_driver_sql("PRAGMA page_count").scalar_one()  # type: ignore[attr-defined]
            writer._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")  # type: ignore[attr-defined]
        with pytest.raises(StorageUnavailable, match="full"), repository.write() as writer:
            writer.add_device(Device("barn-1", os.urandom(1_000_000), 1.0))
        with repository.read() as reader:
            assert reader.devices() == ()
    finally:
        repository.close()


def test_errors_do_not_quote_what_was_stored(tmp_path: Path) -> None:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    try:
        with repository.write() as writer:
            writer.add_device(Device("barn-1", b"secret", 1.0))
        with pytest.raises(Exception, match="UNIQUE") as caught, repository.write() as writer:
            writer.add_device(Device("barn-1", b"secret", 1.0))
        assert "secret" not in str(caught.value)
    finally:
        repository.close()


def test_commits_are_synced_and_deletions_overwritten(tmp_path: Path) -> None:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    try:
        with repository.read() as reader:
            connection = reader._connection  # type: ignore[attr-defined]
            settings = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
            }
        assert settings == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1}
    finally:
        repository.close()


@pytest.mark.parametrize("statement", ["UPDATE audit_log SET outcome = 'done'", "DELETE FROM audit_log"])
def test_nobody_rewrites_the_audit_log(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "aggregator.db"
    repository = sqlite_repository(path)
    with repository.write() as writer:
        writer.append_audit(AuditEntry(1.0, "mallory", "admin", "", "exclude-device", "barn-1", "forbidden"))
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="append"):
        connection.execute(statement)
    repository.close()


def hold_a_secret(repository: SqlRepository) -> None:
    with repository.write() as writer:
        writer.add_campaign(Campaign("c" * 32, "watch", 3, b"{}", 2.0))
        writer.begin_round(ROUND)
        writer.append_log(ROUND.round_id, LogEntry(1.0, "received", "barn-1", SECRET))


def end(repository: SqlRepository) -> None:
    with repository.write() as writer:
        writer.end_round(RoundEnding(ROUND.round_id, "aborted", 9.0, "x", "", b"{}", None, None, ()))


def found_in_files(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if SECRET[2000:2064] in file.read_bytes()]


def test_the_secrets_of_an_ended_round_are_in_no_file(tmp_path: Path) -> None:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    hold_a_secret(repository)
    assert found_in_files(tmp_path)
    end(repository)
    assert found_in_files(tmp_path) == []
    repository.close()


def test_a_reader_does_not_hold_up_the_end_of_a_round_and_its_secrets_go_with_the_next(
    tmp_path: Path,
) -> None:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    hold_a_secret(repository)
    with repository.read() as reader:
        assert reader.log(ROUND.round_id)
        end(repository)
        assert reader.log(ROUND.round_id)  # its view is an older one, which the log keeps
    with repository.write() as writer:
        writer.begin_round(replace(ROUND, round_id="b" * 32, number=2))
    with repository.write() as writer:
        writer.end_round(RoundEnding("b" * 32, "aborted", 9.0, "x", "", b"{}", None, None, ()))
    assert found_in_files(tmp_path) == []
    repository.close()
