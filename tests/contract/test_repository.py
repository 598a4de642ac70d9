"""What `aggregator.repository` promises, shown for every implementation of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from aggregator.access.roles import Role
from aggregator.access.tokens import make_token
from aggregator.adapters.sql import SqlRepository
from aggregator.fleet.enrolment import make_enrolment_token
from aggregator.records import (
    Assigned,
    AuditEntry,
    Campaign,
    ClientCount,
    Device,
    DeviceFilter,
    Evaluation,
    FleetSize,
    IssuedCertificate,
    LedgerEntry,
    LogEntry,
    NoiseTree,
    OptimizerMemory,
    Pin,
    Rollout,
    Round,
    RoundEnding,
    Stage,
    Upload,
    Version,
)
from aggregator.repository import Conflict, NotFound, Repository
from protocol.conditions import Conditions
from protocol.messages import DeviceStatus, VersionFailure
from protocol.transfer import describe
from tests.databases import repository_at

DEVICE = Device("barn-1", b"certificate", 1.0)
CAMPAIGN = Campaign("c" * 32, "watch", 3, b"{}", 2.0)
ROUND = Round("a" * 32, "c" * 32, 1, "watch", 1, b"plan", b"seed", ("barn-1", "barn-2"), 3.0)
VERSION = Version("watch", 2, "d" * 64, b"document", 4.0, ROUND.round_id)
BLOB = describe(b"x" * 100)
ENDING = RoundEnding(
    round_id=ROUND.round_id,
    status="completed",
    ended_at=9.0,
    code="",
    detail="",
    report=b'{"n":1}',
    version=VERSION,
    ledger=LedgerEntry(ROUND.round_id, "watch", 9.0, b"event"),
    transcript=(b"one", b"two"),
)

Opener = Callable[[], Repository]


@pytest.fixture
def opener(empty_database: str) -> Iterator[Opener]:
    """Opens the same database again and again, as separate processes would."""
    opened: list[SqlRepository] = []

    def open_it() -> Repository:
        opened.append(repository_at(empty_database))
        return opened[-1]

    yield open_it
    for repository in opened:
        repository.close()


@pytest.fixture
def repository(opener: Opener) -> Repository:
    return opener()


@pytest.fixture
def running(repository: Repository) -> Repository:
    """A repository with one running round."""
    with repository.write() as writer:
        writer.add_campaign(CAMPAIGN)
        writer.begin_round(ROUND)
    return repository


def test_an_empty_repository_knows_nothing(repository: Repository) -> None:
    with repository.read() as reader:
        assert reader.device("barn-1") is None
        assert reader.devices() == ()
        assert reader.newest_version("watch") is None
        assert reader.version("watch", 1) is None
        assert reader.versions() == reader.newest_versions() == ()
        assert reader.campaign("c" * 32) is None
        assert reader.campaigns() == ()
        assert reader.round("a" * 32) is None
        assert reader.rounds() == ()
        assert reader.log("a" * 32) == ()
        assert reader.inputs("a" * 32) == {}
        assert reader.uploads("a" * 32) == ()
        assert list(reader.chunks("a" * 32, "barn-1")) == []
        assert reader.sum_slice("a" * 32, 0) is None
        assert reader.ledger() == ()
        assert reader.transcript("a" * 32) == ()
        assert reader.transcript_head() is None


def test_an_exception_leaves_everything_as_it_was(repository: Repository) -> None:
    with pytest.raises(RuntimeError), repository.write() as writer:
        writer.add_device(DEVICE)
        assert writer.device("barn-1") == DEVICE
        raise RuntimeError
    with repository.read() as reader:
        assert reader.device("barn-1") is None


def test_what_is_written_is_there_for_others(opener: Opener) -> None:
    first, second = opener(), opener()
    with first.write() as writer:
        writer.add_device(DEVICE)
    with second.read() as reader:
        assert reader.device("barn-1") == DEVICE


def test_a_reader_sees_one_state_while_a_writer_commits(opener: Opener) -> None:
    first, second = opener(), opener()
    with first.read() as reader:
        assert reader.devices() == ()
        with second.write() as writer:
            writer.add_device(DEVICE)
        assert reader.devices() == ()
    with first.read() as reader:
        assert reader.devices() == (DEVICE,)


def test_writers_take_turns(opener: Opener) -> None:
    first, second = opener(), opener()
    with first.write() as writer:
        writer.add_campaign(CAMPAIGN)

    def count(repository: Repository) -> None:
        for _ in range(20):
            with repository.write() as writer:
                campaign = writer.campaign(CAMPAIGN.campaign_id)
                assert campaign is not None
                number = int(campaign.note or 0)
                writer.update_campaign(CAMPAIGN.campaign_id, "waiting", str(number + 1))

    threads = [threading.Thread(target=count, args=(each,)) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with first.read() as reader:
        campaign = reader.campaign(CAMPAIGN.campaign_id)
    assert campaign is not None
    assert campaign.note == "40"


def test_devices(repository: Repository) -> None:
    other = Device("attic-1", b"other", 1.0)
    with repository.write() as writer:
        writer.add_device(DEVICE)
        writer.add_device(other)
        writer.replace_certificate("barn-1", b"renewed")
        writer.set_exclusion("barn-1", "noisy")
        born = DeviceStatus(
            session=bytes(32),
            online=True,
            client_version="1.0",
            runtime="lite",
            target="bookworm-arm64",
            models={"watch": 3},
            conditions=Conditions(power="mains", metered=False, temperature=51.5),
        )
        writer.note_status("barn-1", born, 5.0)
        writer.note_status("nobody", born, 5.0)
    seen = replace(
        DEVICE,
        certificate=b"renewed",
        excluded="noisy",
        online=True,
        client_version="1.0",
        runtime="lite",
        target="bookworm-arm64",
        models={"watch": 3},
        conditions=Conditions(power="mains", metered=False, temperature=51.5),
        last_seen=5.0,
    )
    with repository.read() as reader:
        assert reader.devices() == (other, seen)
        assert set(reader.client_counts()) == {
            ClientCount("1.0", "bookworm-arm64", 1, 1),
            ClientCount(other.client_version, other.target, 1, 0),
        }
    gone = DeviceStatus(session=bytes(32), online=False, models={})
    with repository.write() as writer:
        writer.note_status("barn-1", gone, 6.0)
        writer.set_exclusion("barn-1", None)
    with repository.read() as reader:
        assert reader.device("barn-1") == replace(seen, online=False, excluded=None, last_seen=6.0)


def test_enrolment_tokens(repository: Repository) -> None:
    made = [
        make_enrolment_token(
            bytes([number]) * 38,
            name=f"barn-{number}",
            labels=("site=barn", "a"),
            replaces=number == 2,
            now=float(number),
            seconds=60.0,
            created_by="token:1 laptop",
        )[1]
        for number in (1, 2)
    ]
    with repository.write() as writer:
        for token in made:
            writer.add_enrolment_token(token)
        writer.use_enrolment_token(made[0].token_id, "f" * 64, 7.0)
        writer.revoke_enrolment_token(made[1].token_id, 8.0)
        writer.revoke_enrolment_token(made[1].token_id, 9.0)
    used = replace(made[0], used_at=7.0, key_id="f" * 64)
    with repository.read() as reader:
        assert reader.enrolment_tokens() == (used, replace(made[1], revoked_at=8.0))
        assert reader.enrolment_token(made[0].token_id) == used
        assert reader.enrolment_token("0" * 12) is None
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_enrolment_token(made[0])
    with pytest.raises(NotFound), repository.write() as writer:
        writer.use_enrolment_token(made[0].token_id, "e" * 64, 9.0)
    with pytest.raises(NotFound), repository.write() as writer:
        writer.revoke_enrolment_token("0" * 12, 9.0)


def test_certificates_and_what_became_of_a_device(repository: Repository) -> None:
    first = IssuedCertificate("1f", "barn-1", issued_at=1.0, expires_at=100.0)
    second = replace(first, serial="20", issued_at=2.0)
    with repository.write() as writer:
        writer.add_device(DEVICE)
        writer.add_device(replace(DEVICE, device_id="barn-2"))
        for certificate in (second, first, replace(first, serial="21", device_id="barn-2")):
            writer.add_certificate(certificate)
        writer.revoke_certificate("1f", 3.0, "stolen")
        writer.revoke_certificate("1f", 4.0, "again")
        writer.set_device_state("barn-1", "revoked")
    revoked = replace(first, revoked_at=3.0, reason="stolen")
    with repository.read() as reader:
        assert reader.certificates("barn-1") == (revoked, second)
        assert reader.certificates(revoked=True) == (revoked,)
        assert [each.serial for each in reader.certificates(revoked=False)] == ["21", "20"]
        assert reader.device("barn-1") == replace(DEVICE, state="revoked")
    with repository.write() as writer:
        writer.note_enrolment("barn-1", "abcdef012345", 9.0)
    with repository.read() as reader:
        assert reader.device("barn-1") == replace(DEVICE, enrolled_at=9.0, token_id="abcdef012345")
    for stray in (first, replace(first, serial="22", device_id="nobody")):
        with pytest.raises(Conflict), repository.write() as writer:
            writer.add_certificate(stray)
    with pytest.raises(NotFound), repository.write() as writer:
        writer.revoke_certificate("23", 3.0, "")
    with pytest.raises(NotFound), repository.write() as writer:
        writer.set_device_state("nobody", "retired")


def test_the_size_of_the_fleet(repository: Repository) -> None:
    with repository.read() as reader:
        assert reader.fleet_size() == FleetSize(0, 0, 0)
    with repository.write() as writer:
        for name in ("barn-1", "barn-2", "barn-3"):
            writer.add_device(replace(DEVICE, device_id=name))
        for name in ("barn-1", "barn-2"):
            writer.note_status(name, DeviceStatus(session=b"s" * 32, online=True, models={}), 2.0)
        writer.set_exclusion("barn-2", "lied")
    with repository.read() as reader:
        assert reader.fleet_size() == FleetSize(enrolled=3, online=2, excluded=1)


def test_the_state_of_a_device(repository: Repository) -> None:
    with repository.write() as writer:
        assert writer.device_state(DEVICE.device_id) is None
        writer.add_device(DEVICE)
        assert writer.device_state(DEVICE.device_id) == "active"
        writer.set_device_state(DEVICE.device_id, "revoked")
    with repository.read() as reader:
        assert reader.device_state(DEVICE.device_id) == "revoked"


def test_a_device_is_enrolled_once(repository: Repository) -> None:
    with repository.write() as writer:
        writer.add_device(DEVICE)
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_device(DEVICE)
    with pytest.raises(NotFound), repository.write() as writer:
        writer.replace_certificate("nobody", b"")
    with pytest.raises(NotFound), repository.write() as writer:
        writer.set_exclusion("nobody", "x")


def test_names_are_in_the_order_of_their_bytes(repository: Repository) -> None:
    names = ["barn-1", "barn-10", "barn-2", "barn0", "barna-1"]
    with repository.write() as writer:
        for name in reversed(names):
            writer.add_device(replace(DEVICE, device_id=name))
            writer.add_version(replace(VERSION, model=name, round_id=None))
    with repository.read() as reader:
        assert [device.device_id for device in reader.devices()] == names
        assert [version.model for version in reader.newest_versions()] == names
        page = reader.devices_page(DeviceFilter(), after="barn-10", limit=2)
        assert [device.device_id for device in page] == ["barn-2", "barn0"]


def test_versions(repository: Repository) -> None:
    first, other = replace(VERSION, version=1, round_id=None), replace(VERSION, model="digits", round_id=None)
    with repository.write() as writer:
        writer.add_version(VERSION)
        writer.add_version(first)
        writer.add_version(other)
    with repository.read() as reader:
        assert reader.versions("watch") == (first, VERSION)
        assert reader.versions() == (other, first, VERSION)
        assert reader.newest_version("watch") == VERSION
        assert reader.newest_versions() == (other, VERSION)
        assert reader.version("watch", 1) == first
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_version(replace(first, manifest_sha256="e" * 64))
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_version(replace(VERSION, version=3))  # one round publishes once


def test_campaigns_and_rounds(running: Repository) -> None:
    later = Campaign("e" * 32, "watch", 1, b"{}", 2.5)
    with running.write() as writer:
        writer.add_campaign(later)
    with running.read() as reader:
        campaign = reader.campaign(CAMPAIGN.campaign_id)
        assert campaign == replace(CAMPAIGN, status="running", started=1)
        assert reader.campaigns() == (campaign, later)
        assert reader.campaigns("waiting") == (later,)
        assert reader.campaigns("running", "waiting") == (campaign, later)
        assert reader.round(ROUND.round_id) == ROUND
        assert reader.rounds(status="running") == (ROUND,)
        assert reader.rounds(campaign_id=later.campaign_id) == ()
    second = replace(ROUND, round_id="b" * 32, number=2)
    with running.write() as writer:
        writer.begin_round(second)
        writer.update_campaign(CAMPAIGN.campaign_id, "failed", "no reason")
        writer.save_report(second.round_id, b"{1}")
    with running.read() as reader:
        assert reader.rounds() == (ROUND, replace(second, report=b"{1}"))
        assert reader.rounds(last=1) == (replace(second, report=b"{1}"),)
        assert reader.campaign(CAMPAIGN.campaign_id) == replace(
            CAMPAIGN, status="failed", started=2, note="no reason"
        )


def test_round_ids_and_numbers_are_never_used_twice(running: Repository) -> None:
    with pytest.raises(Conflict), running.write() as writer:
        writer.begin_round(replace(ROUND, number=2))
    with pytest.raises(Conflict), running.write() as writer:
        writer.begin_round(replace(ROUND, round_id="b" * 32))
    with pytest.raises(Conflict), running.write() as writer:
        writer.add_campaign(CAMPAIGN)
    with pytest.raises(NotFound), running.write() as writer:
        writer.begin_round(replace(ROUND, round_id="b" * 32, campaign_id="f" * 32))
    with running.read() as reader:
        campaign = reader.campaign(CAMPAIGN.campaign_id)
    assert campaign is not None
    assert campaign.started == 1


def test_the_log_keeps_its_order(running: Repository) -> None:
    entries = [LogEntry(float(9 - i), "received", f"barn-{i}", bytes([i])) for i in range(5)]
    entries.append(LogEntry(1.0, "closed"))
    with running.write() as writer:
        for entry in entries:
            writer.append_log(ROUND.round_id, entry)
    with running.read() as reader:
        assert reader.log(ROUND.round_id) == tuple(entries)
    with pytest.raises(NotFound), running.write() as writer:
        writer.append_log("b" * 32, entries[0])


def test_uploads_resume_with_the_chunks_that_are_stored(running: Repository) -> None:
    with running.write() as writer:
        writer.open_upload(ROUND.round_id, "barn-1", BLOB)
        writer.store_chunk(ROUND.round_id, "barn-1", 2, b"two")
        writer.store_chunk(ROUND.round_id, "barn-1", 0, b"zero")
        writer.store_chunk(ROUND.round_id, "barn-1", 2, b"again")
        writer.open_upload(ROUND.round_id, "barn-2", BLOB)
    with running.read() as reader:
        assert reader.uploads(ROUND.round_id) == (
            Upload(ROUND.round_id, "barn-1", BLOB, frozenset({0, 2})),
            Upload(ROUND.round_id, "barn-2", BLOB, frozenset()),
        )
        assert list(reader.chunks(ROUND.round_id, "barn-1")) == [b"zero", b"two"]
    with running.write() as writer:
        writer.open_upload(ROUND.round_id, "barn-1", describe(b"another"))
        assert list(writer.chunks(ROUND.round_id, "barn-1")) == []
        writer.drop_upload(ROUND.round_id, "barn-1")
        writer.drop_upload(ROUND.round_id, "barn-1")
        assert [upload.device_id for upload in writer.uploads(ROUND.round_id)] == ["barn-2"]
        writer.drop_uploads(ROUND.round_id)
        assert writer.uploads(ROUND.round_id) == ()


def test_chunks_need_an_upload_and_uploads_a_round(running: Repository) -> None:
    with pytest.raises(NotFound), running.write() as writer:
        writer.store_chunk(ROUND.round_id, "barn-1", 0, b"x")
    with pytest.raises(NotFound), running.write() as writer:
        writer.open_upload("b" * 32, "barn-1", BLOB)


def test_an_input_is_noted_once_and_with_what_came_with_it(running: Repository) -> None:
    with running.write() as writer:
        writer.put_sum_slice(ROUND.round_id, 0, b"first")
        writer.note_input(ROUND.round_id, "barn-1", "1" * 64)
    with pytest.raises(Conflict), running.write() as writer:
        writer.put_sum_slice(ROUND.round_id, 0, b"twice")
        writer.note_input(ROUND.round_id, "barn-1", "1" * 64)
    with running.write() as writer:
        assert writer.sum_slice(ROUND.round_id, 0) == b"first"
        writer.put_sum_slice(ROUND.round_id, 0, b"second")
        writer.put_sum_slice(ROUND.round_id, 8, b"eighth")
        writer.note_input(ROUND.round_id, "barn-2", "2" * 64)
    with running.read() as reader:
        assert reader.inputs(ROUND.round_id) == {"barn-1": "1" * 64, "barn-2": "2" * 64}
        assert reader.sum_slice(ROUND.round_id, 0) == b"second"
        assert reader.sum_slice(ROUND.round_id, 8) == b"eighth"


def test_the_end_of_a_round_is_one_step(running: Repository) -> None:
    with running.write() as writer:
        writer.append_log(ROUND.round_id, LogEntry(1.0, "closed"))
        writer.open_upload(ROUND.round_id, "barn-1", BLOB)
        writer.store_chunk(ROUND.round_id, "barn-1", 0, b"x")
        writer.put_sum_slice(ROUND.round_id, 0, b"sum")
        writer.note_input(ROUND.round_id, "barn-2", "2" * 64)
    with running.write() as writer:
        writer.end_round(ENDING)
    with running.read() as reader:
        assert reader.round(ROUND.round_id) == replace(
            ROUND, status="completed", ended_at=9.0, report=b'{"n":1}', version=2
        )
        assert reader.newest_version("watch") == VERSION
        assert reader.ledger() == reader.ledger("watch") == (ENDING.ledger,)
        assert reader.ledger("digits") == ()
        assert reader.transcript(ROUND.round_id) == (b"one", b"two")
        assert reader.transcript_head() == b"two"
        assert reader.rounds(status="running") == ()
        # Nothing of the round's secrets is left.
        assert reader.log(ROUND.round_id) == ()
        assert reader.uploads(ROUND.round_id) == ()
        assert list(reader.chunks(ROUND.round_id, "barn-1")) == []
        assert reader.sum_slice(ROUND.round_id, 0) is None
        assert reader.inputs(ROUND.round_id) == {}


def test_a_round_ends_once(running: Repository) -> None:
    with running.write() as writer:
        writer.end_round(ENDING)
    again = replace(ENDING, version=replace(VERSION, version=3, manifest_sha256="f" * 64))
    with pytest.raises(NotFound), running.write() as writer:
        writer.end_round(again)
    with pytest.raises(NotFound), running.write() as writer:
        writer.open_upload(ROUND.round_id, "barn-1", BLOB)
    with running.read() as reader:
        assert reader.versions() == (VERSION,)
        assert len(reader.ledger()) == 1


def test_an_ending_that_conflicts_changes_nothing(running: Repository) -> None:
    with running.write() as writer:
        writer.add_version(replace(VERSION, round_id=None))
    with pytest.raises(Conflict), running.write() as writer:
        writer.end_round(ENDING)
    with running.read() as reader:
        assert reader.rounds(status="running") == (ROUND,)
        assert reader.ledger() == ()
        assert reader.transcript(ROUND.round_id) == ()


def test_an_aborted_round_leaves_no_version(running: Repository) -> None:
    with running.write() as writer:
        writer.end_round(
            replace(ENDING, status="aborted", code="too-few", detail="1 of 3", version=None, ledger=None)
        )
    with running.read() as reader:
        ended = reader.round(ROUND.round_id)
        assert ended is not None
        assert (ended.status, ended.code, ended.detail, ended.version) == (
            "aborted",
            "too-few",
            "1 of 3",
            None,
        )
        assert reader.versions() == ()
        assert reader.ledger() == ()


def test_a_page_of_devices_by_label_presence_and_version(repository: Repository) -> None:
    labels = {"barn-1": ("barn", "site=north"), "barn-2": ("barn",), "shed-1": ("barn_x", "site=north")}
    with repository.write() as writer:
        for number, (name, these) in enumerate(labels.items(), start=1):
            writer.add_device(replace(DEVICE, device_id=name))
            writer.set_labels(name, these)
            birth = DeviceStatus(
                session=bytes(32), online=number != 2, models={"watch": number, "w": 12}, client_version="0.1"
            )
            writer.note_status(name, birth, 5.0)
            if number == 2:
                gone = DeviceStatus(session=bytes(32), online=False, models={})
                writer.note_status(name, gone, 6.0)
        with pytest.raises(NotFound):
            writer.set_labels("nobody", ())

    def names(which: DeviceFilter, after: str = "", limit: int = 10) -> list[str]:
        with repository.read() as reader:
            return [device.device_id for device in reader.devices_page(which, after=after, limit=limit)]

    assert names(DeviceFilter()) == list(labels)
    assert names(DeviceFilter(), limit=2) == ["barn-1", "barn-2"]
    assert names(DeviceFilter(), after="barn-2") == ["shed-1"]
    assert names(DeviceFilter(label="barn")) == ["barn-1", "barn-2"]
    assert names(DeviceFilter(label="bar")) == names(DeviceFilter(label="%")) == []
    assert names(DeviceFilter(label="barn_x")) == ["shed-1"]
    assert names(DeviceFilter(label="site=north", online=True)) == ["barn-1", "shed-1"]
    assert names(DeviceFilter(online=False)) == ["barn-2"]
    assert names(DeviceFilter(answers_with=("watch", 1))) == ["barn-1"]
    assert names(DeviceFilter(answers_with=("w", 1))) == []
    assert names(DeviceFilter(answers_with=("w", 12))) == ["barn-1", "shed-1"]
    assert names(DeviceFilter(client_version="0.2")) == []
    assert names(DeviceFilter(text="north")) == ["barn-1", "shed-1"]
    assert names(DeviceFilter(text="shed")) == names(DeviceFilter(text="barn_x")) == ["shed-1"]
    assert names(DeviceFilter(text="%")) == names(DeviceFilter(text="barn?")) == []
    with repository.write() as writer:
        writer.set_exclusion("barn-2", "broken")
    assert names(DeviceFilter(excluded=True)) == ["barn-2"]
    assert names(DeviceFilter(excluded=False)) == ["barn-1", "shed-1"]
    with repository.read() as reader:
        assert reader.count_devices(DeviceFilter()) == 3
        assert reader.count_devices(DeviceFilter(online=True, text="barn")) == 2
        device = reader.device("barn-1")
    assert device is not None and device.labels == ("barn", "site=north")


def test_rounds_before_one(running: Repository) -> None:
    with running.write() as writer:
        writer.end_round(replace(ENDING, version=None))
        writer.begin_round(replace(ROUND, round_id="b" * 32, number=2))
    with running.read() as reader:
        assert [found.number for found in reader.rounds(before="b" * 32)] == [1]
        assert reader.rounds(before="a" * 32) == reader.rounds(before="f" * 32) == ()


def test_tokens_are_found_by_id_and_revoked_once(repository: Repository) -> None:
    _, token = make_token(
        bytes(38), role=Role.OPERATOR, label="laptop", now=1.0, seconds=9.0, created_by="ada"
    )
    with repository.write() as writer:
        writer.add_token(token)
        assert writer.token(token.token_id) == token
        writer.revoke_token(token.token_id, 3.0)
        writer.revoke_token(token.token_id, 4.0)
        with pytest.raises(NotFound):
            writer.revoke_token("f" * 12, 4.0)
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_token(token)
    with repository.read() as reader:
        assert reader.tokens() == (replace(token, revoked_at=3.0),)
        assert reader.token("f" * 12) is None


def test_the_audit_log_is_read_from_its_end(repository: Repository) -> None:
    entry = AuditEntry(1.0, "token:1 laptop", "admin", "127.0.0.1", "exclude-device", "barn-1")
    with repository.write() as writer:
        for at in (1.0, 2.0, 3.0):
            writer.append_audit(replace(entry, at=at))
    with repository.read() as reader:
        newest, middle = reader.audit(limit=2)
        assert (newest.at, middle) == (3.0, replace(entry, at=2.0, number=newest.number - 1))
        assert [found.at for found in reader.audit(before=middle.number)] == [1.0]


def test_a_query_has_no_model(repository: Repository) -> None:
    campaign = replace(CAMPAIGN, model=None)
    asked = replace(ROUND, model=None, base_version=None)
    ledger = LedgerEntry(ROUND.round_id, None, 9.0, b"event")
    with repository.write() as writer:
        writer.add_campaign(campaign)
        writer.begin_round(asked)
        writer.end_round(replace(ENDING, version=None, ledger=ledger))
    with repository.read() as reader:
        (found,) = reader.campaigns()
        assert found.model is None
        (round_,) = reader.rounds()
        assert (round_.model, round_.base_version, round_.version, round_.status) == (
            None,
            None,
            None,
            "completed",
        )
        assert reader.ledger() == (ledger,)
        assert reader.ledger("watch") == ()


def test_evaluations_are_kept_with_their_version(running: Repository) -> None:
    found = Evaluation(ROUND.round_id, "watch", 3, 9.0, b"figures")
    with running.write() as writer:
        writer.end_round(replace(ENDING, version=None, evaluation=found))
    with running.read() as reader:
        assert reader.evaluations("watch", 3) == reader.evaluations("watch") == (found,)
        assert reader.evaluations("watch", 2) == reader.evaluations("digits") == ()


def test_how_a_cohort_was_drawn_and_who_has_trained(running: Repository) -> None:
    with running.write() as writer:
        writer.note_selection(ROUND.round_id, b"record")
    with pytest.raises(Conflict), running.write() as writer:
        writer.note_selection(ROUND.round_id, b"another")
    with running.write() as writer:
        writer.end_round(replace(ENDING, contributors=("barn-1", "barn-2")))
    with running.read() as reader:
        assert reader.selection(ROUND.round_id) == b"record"
        assert reader.selection("f" * 32) is None
        assert reader.contributors("watch") == {"barn-1", "barn-2"}
        assert reader.contributors("digits") == frozenset()


def test_how_old_cohorts_were_drawn_is_forgotten_a_few_at_a_time(running: Repository) -> None:
    rounds = [ROUND, *(replace(ROUND, round_id=f"{number}" * 32, number=number) for number in (2, 3, 4))]
    with running.write() as writer:
        for round_ in rounds:
            if round_ is not ROUND:
                writer.begin_round(round_)
            writer.note_selection(round_.round_id, b"record")
        for at, round_ in zip((10.0, 20.0, 30.0), rounds, strict=False):
            ending = replace(ENDING, round_id=round_.round_id, ended_at=at, version=None, ledger=None)
            writer.end_round(ending)
    with running.write() as writer:
        # The last round is running: it has no end to be before anything.
        assert [writer.forget_selections(before, 1) for before in (10.0, 25.0, 25.0, 25.0)] == [0, 1, 1, 0]
    with running.read() as reader:
        assert [reader.selection(each.round_id) for each in rounds] == [None, None, b"record", b"record"]


def test_what_an_optimizer_remembers_is_replaced(running: Repository) -> None:
    first = OptimizerMemory(CAMPAIGN.campaign_id, 1, b"momentum")
    second = replace(first, rounds=2, second_moment=b"moment")
    with running.write() as writer:
        assert writer.optimizer_memory(CAMPAIGN.campaign_id) is None
        writer.keep_optimizer_memory(first)
        writer.keep_optimizer_memory(second)
    with running.read() as reader:
        assert reader.optimizer_memory(CAMPAIGN.campaign_id) == second
    with running.write() as writer:
        writer.forget_optimizer_memory(CAMPAIGN.campaign_id)
        writer.forget_optimizer_memory(CAMPAIGN.campaign_id)
        assert writer.optimizer_memory(CAMPAIGN.campaign_id) is None


def test_a_campaign_has_one_noise_tree_that_moves_forward(running: Repository) -> None:
    tree = NoiseTree(CAMPAIGN.campaign_id, "a" * 64, bytes(range(32)))
    with running.write() as writer:
        assert writer.noise_tree(tree.campaign_id) is None
        writer.plant_noise_tree(tree)
        writer.note_leaf_released(tree.campaign_id, 2)
    with running.read() as reader:
        assert reader.noise_tree(tree.campaign_id) == replace(tree, released=2)
    for leaf in (1, 2):
        with pytest.raises(NotFound), running.write() as writer:
            writer.note_leaf_released(tree.campaign_id, leaf)
    later = replace(tree, tree="b" * 64, key=bytes(32))
    with running.write() as writer:
        writer.plant_noise_tree(later)
        assert writer.noise_tree(tree.campaign_id) == later
        writer.fell_noise_tree(tree.campaign_id)
        writer.fell_noise_tree(tree.campaign_id)
        assert writer.noise_tree(tree.campaign_id) is None
    with pytest.raises(NotFound), running.write() as writer:
        writer.note_leaf_released(tree.campaign_id, 3)


# --- who has which version


def test_a_version_has_a_stage(repository: Repository) -> None:
    with repository.write() as writer:
        writer.add_version(VERSION)
        writer.set_stage("watch", VERSION.version, "withdrawn")
        with pytest.raises(NotFound):
            writer.set_stage("watch", 99, "stable")
    with repository.read() as reader:
        assert reader.version("watch", VERSION.version) == replace(VERSION, stage="withdrawn")


def test_the_newest_version_in_some_stages(repository: Repository) -> None:
    stages: tuple[Stage, ...] = ("stable", "stable", "canary", "candidate", "withdrawn")
    with repository.write() as writer:
        for number, stage in enumerate(stages, 1):
            writer.add_version(replace(VERSION, version=number, round_id=None, stage=stage))
        writer.add_version(replace(VERSION, model="digits", version=9, round_id=None, stage="stable"))
    expected: tuple[tuple[tuple[Stage, ...], int | None], ...] = (
        ((), 5),
        (("stable",), 2),
        (("stable", "canary"), 3),
        (("candidate", "canary", "stable"), 4),
        (("withdrawn",), 5),
    )
    with repository.read() as reader:
        for asked, number in expected:
            found = reader.newest_version("watch", *asked)
            assert (None if found is None else found.version) == number
        assert reader.newest_version("digits", "candidate") is None
        assert reader.newest_version("forecast", "stable") is None


def test_a_pin_replaces_one_of_the_same_target(repository: Repository) -> None:
    first = Pin("watch", "device", "barn-1", 1, 5.0)
    group = Pin("watch", "group", "site=north", 2, 6.0)
    with repository.write() as writer:
        for pin in (group, first, replace(first, version=3)):
            writer.set_pin(pin)
    with repository.write() as writer:
        assert writer.pins() == writer.pins("watch") == (replace(first, version=3), group)
        writer.drop_pin("watch", "device", "barn-1")
        assert writer.pins("watch") == (group,) and writer.pins("digits") == ()
        with pytest.raises(NotFound):
            writer.drop_pin("watch", "device", "barn-1")


def test_the_sequence_of_an_assignment_only_rises(repository: Repository) -> None:
    fleet = Assigned("watch", "", 4_000_000_000, 1, b"document")
    own = Assigned("watch", "barn-1", 7, None, b"own")
    with repository.write() as writer:
        writer.assign(fleet)
        writer.assign(own)
        for stale in (fleet, replace(fleet, sequence=3)):
            with pytest.raises(Conflict):
                writer.assign(stale)
        writer.assign(replace(fleet, sequence=fleet.sequence + 1, version=2))
    with repository.read() as reader:
        assert reader.assigned("watch") == replace(fleet, sequence=fleet.sequence + 1, version=2)
        assert reader.assigned("watch", "barn-1") == own and reader.assigned("digits") is None
        assert reader.assigned_devices("watch") == (own,)


def test_devices_with_a_version_of_their_own(repository: Repository) -> None:
    b, a, gone = (
        Assigned("watch", name, 5, version, b"own") for name, version in (("b", 2), ("a", 1), ("c", None))
    )
    with repository.write() as writer:
        for each in (b, a, gone, Assigned("watch", "", 9, 3, b"all"), Assigned("digits", "a", 1, 1, b"")):
            writer.assign(each)
    with repository.read() as reader:
        assert reader.assigned_devices("watch") == (a, b, gone)
        assert reader.assigned_devices("watch", of_its_own=True) == (a, b)
        assert reader.assigned_devices("forecast") == ()


def test_rollouts_keep_their_pool_and_change_their_progress(repository: Repository) -> None:
    first = Rollout("1" * 32, "watch", 2, b"{}", ("barn-1", "barn-2"), 5.0, "running", b"begun")
    second = replace(first, rollout_id="2" * 32, status="halted")
    with repository.write() as writer:
        writer.add_rollout(first)
        writer.add_rollout(second)
        writer.update_rollout(first.rollout_id, "completed", b"over")
        with pytest.raises(NotFound):
            writer.update_rollout("3" * 32, "completed", b"")
    over = replace(first, status="completed", progress=b"over")
    with repository.read() as reader:
        assert reader.rollouts() == (over, second) and reader.rollouts("halted", "paused") == (second,)
        assert reader.rollout(first.rollout_id) == over and reader.rollout("3" * 32) is None
    with pytest.raises(Conflict), repository.write() as writer:
        writer.add_rollout(first)


def test_a_status_tells_of_versions_that_failed(repository: Repository) -> None:
    failures = {"watch": VersionFailure(version=2, code="model-unusable", detail="not finite")}
    status = DeviceStatus(session=bytes(32), online=True, models={"watch": 1}, failures=failures)
    with repository.write() as writer:
        writer.add_device(DEVICE)
        writer.note_status(DEVICE.device_id, status, 3.0)
    with repository.read() as reader:
        device = reader.device(DEVICE.device_id)
    assert device is not None and device.failures == failures
