"""What only a database server can show: writers on other machines, restarts, lost connections, passwords."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import create_engine

from aggregator.adapters import sql_engine
from aggregator.adapters.sql import SqlRepository
from aggregator.records import Campaign, Device
from aggregator.repository import (
    Contended,
    OutcomeUnknown,
    StorageUnavailable,
    Superseded,
    Unstorable,
)
from tests.databases import PostgresProcess, repository_at

DEVICE = Device("barn-1", b"certificate", 1.0)
CAMPAIGN = Campaign("c" * 32, "watch", 3, b"{}", 2.0)


@pytest.fixture
def url(postgres: PostgresProcess) -> str:
    return postgres.new_database()


@pytest.fixture
def repository(url: str) -> Iterator[SqlRepository]:
    repository = repository_at(url)
    yield repository
    repository.close()


def end_sessions(url: str) -> None:
    """Ends every other connection to the database, as a restart of the server or a firewall does."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    engine.dispose()


def test_commits_are_durable_whatever_the_server_prefers(url: str) -> None:
    with ExitStack() as stack:
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        stack.callback(engine.dispose)
        with engine.connect() as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        repository = repository_at(url)
        stack.callback(repository.close)
        with repository.write() as writer:
            query = "SHOW synchronous_commit"
            assert writer._connection.exec_driver_sql(query).scalar_one() == "on"  # type: ignore[attr-defined]


def test_a_reader_cannot_write(repository: SqlRepository) -> None:
    with pytest.raises(StorageUnavailable, match="read-only"), repository.read() as reader:
        reader._connection.exec_driver_sql("DELETE FROM devices")  # type: ignore[attr-defined]


def test_a_writer_that_takes_too_long_is_not_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sql_engine._POSTGRESQL_SESSION, "lock_timeout", "200ms")
    first, second = repository_at(url), repository_at(url)
    with first.write() as writer:
        writer.add_device(DEVICE)
        with pytest.raises(Contended, match="try again"), second.write():
            pass
        with second.read() as reader:  # never waits
            assert reader.devices() == ()
    with second.write() as other:
        assert other.device("barn-1") == DEVICE
    first.close()
    second.close()


def test_a_conflict_with_somebody_who_does_not_lock_is_named_and_can_be_repeated(
    url: str, repository: SqlRepository
) -> None:
    """An administrator's own transaction ends in a serialisation failure here, never in lost changes."""
    with repository.write() as writer:
        writer.add_campaign(CAMPAIGN)
    engine = create_engine(url)
    with pytest.raises(Contended, match=r"could not serialize.*try again"), repository.write() as writer:
        assert writer.campaign(CAMPAIGN.campaign_id) is not None
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE campaigns SET note = 'by hand'")
        writer.update_campaign(CAMPAIGN.campaign_id, "running", "lost")
    engine.dispose()
    with repository.write() as writer:
        campaign = writer.campaign(CAMPAIGN.campaign_id)
        assert campaign is not None
        writer.update_campaign(CAMPAIGN.campaign_id, "running", f"{campaign.note}, then by Covey")
    with repository.read() as reader:
        campaign = reader.campaign(CAMPAIGN.campaign_id)
    assert campaign is not None
    assert campaign.note == "by hand, then by Covey"


def test_many_writers_never_fail_to_serialise(url: str) -> None:
    repositories = [repository_at(url) for _ in range(4)]
    with repositories[0].write() as writer:
        writer.add_campaign(CAMPAIGN)
    errors: list[Exception] = []

    def count(repository: SqlRepository) -> None:
        try:
            for _ in range(15):
                with repository.write() as writer:
                    campaign = writer.campaign(CAMPAIGN.campaign_id)
                    assert campaign is not None
                    writer.update_campaign(CAMPAIGN.campaign_id, "running", str(int(campaign.note or 0) + 1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=count, args=(each,)) for each in repositories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with repositories[0].read() as reader:
        campaign = reader.campaign(CAMPAIGN.campaign_id)
    assert campaign is not None
    assert campaign.note == "60"
    for repository in repositories:
        repository.close()


def test_a_connection_lost_in_a_transaction_changes_nothing(url: str, repository: SqlRepository) -> None:
    with pytest.raises(StorageUnavailable) as caught, repository.write() as writer:
        writer.add_device(DEVICE)
        end_sessions(url)
        writer.devices()
    assert not isinstance(caught.value, OutcomeUnknown)
    with repository.read() as reader:
        assert reader.devices() == ()


def test_a_connection_lost_while_it_commits_is_said_to_be_unknown(
    url: str, repository: SqlRepository
) -> None:
    with pytest.raises(OutcomeUnknown, match="look whether it was done"), repository.write() as writer:
        writer.add_device(DEVICE)
        end_sessions(url)


def test_a_server_that_is_killed_is_unavailable_and_then_as_it_was(postgres: PostgresProcess) -> None:
    repository = repository_at(postgres.new_database())
    with repository.write() as writer:
        writer.add_device(DEVICE)
    postgres.kill()
    with pytest.raises(StorageUnavailable), repository.write() as writer:
        writer.set_exclusion("barn-1", "never written")
    with pytest.raises(StorageUnavailable), repository.read():
        pass
    postgres.start()
    with repository.write() as writer:  # with no new repository: the service goes on
        assert writer.device("barn-1") == DEVICE
    repository.close()


def test_what_cannot_be_stored_is_no_outage(repository: SqlRepository) -> None:
    with pytest.raises(Unstorable), repository.write() as writer:
        writer.add_device(Device("barn-1", b"", 1.0, excluded="a zero byte: \0"))


def test_errors_do_not_quote_rows(repository: SqlRepository) -> None:
    with pytest.raises(Exception, match="null value") as caught, repository.write() as writer:
        writer.add_device(Device("barn-1", None, 1.0, excluded="secret"))  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_unavailable_and_its_password_is_kept() -> None:
    with pytest.raises(StorageUnavailable) as caught:
        SqlRepository("postgresql://covey:hunter2@127.0.0.1:1/covey")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)
    with pytest.raises(StorageUnavailable, match="cannot be read") as caught:
        SqlRepository("postgresql//covey:hunter2")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


# --- one service for one database


def test_two_services_on_one_database_are_one_too_many(url: str) -> None:
    first, second = repository_at(url), repository_at(url)
    with first.claim():
        with pytest.raises(Superseded, match="another aggregator runs"), second.claim():
            pass
        with second.write() as operator:
            operator.add_device(DEVICE)
        with first.write() as service:
            assert service.device("barn-1") == DEVICE
    with second.claim(), second.write() as service:
        service.set_exclusion("barn-1", "mine now")
    first.close()
    second.close()


def test_a_service_claims_again_what_nobody_took_while_the_server_was_away(url: str) -> None:
    first, second = repository_at(url), repository_at(url)
    with first.claim():
        end_sessions(url)
        with first.write() as service:
            service.add_device(DEVICE)
        with pytest.raises(Superseded), second.claim():
            pass
    first.close()
    second.close()


def test_a_service_whose_claim_was_taken_over_writes_nothing_more(url: str) -> None:
    first, second = repository_at(url), repository_at(url)
    with first.claim():
        end_sessions(url)
        with second.claim():
            with pytest.raises(Superseded), first.write() as service:
                service.add_device(DEVICE)
            with second.read() as reader:
                assert reader.devices() == ()
    first.close()
    second.close()
