"""The pure parts of a round: state machine and its log, selection, partial sum, settings."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.clock import Moment
from aggregator.records import Campaign, LogEntry, Round
from aggregator.repository import Repository
from aggregator.rounds import machine
from aggregator.rounds.events import (
    DeviceHeard,
    DeviceOffline,
    DeviceOnline,
    Event,
    Log,
    MaskedInputStored,
    MessageReceived,
    Output,
    Reconnected,
    Send,
    Tick,
)
from aggregator.rounds.machine import RoundState
from aggregator.rounds.partial_sum import SLICE, UnusableInput, add_input, input_size, load_sum
from aggregator.rounds.planning import CampaignSettings, check_settings
from aggregator.rounds.selection import ready, select
from aggregator.rounds.subcohort_state import SubcohortState, Trust
from aggregator.settings import CampaignRequest, InvalidSettings
from models import zoo
from protocol import ring
from protocol.codec import decode_from_device
from protocol.dp.events import event_for
from protocol.dp.mechanism import EncodingParameters, derive_encoding
from protocol.dp.parameters import PrivacyMode
from protocol.errors import IllegalEvent, ProtocolError
from protocol.fields import BlobRef
from protocol.messages import AdvertiseKeys, ClientAbort, Invitation, Refusal, UploadOffer
from protocol.plan import TrainingParameters
from protocol.secagg.parameters import parameters
from protocol.secagg.server_state import Failed, Recovered
from protocol.transfer import describe
from tests.aggregator_bench import Bench
from tests.aggregator_devices import SimulatedDevice
from tests.databases import sqlite_repository
from tests.toy_rounds import REQUEST

START = Moment(0.0, 1_800_000_000.0)


class Table:
    """Devices around a machine, with nothing in between; keeps everything that was logged and sent."""

    def __init__(self, path: Path, size: int = 4) -> None:
        self.bench = Bench(path, devices=size, parameters=50)
        self.devices: dict[str, SimulatedDevice] = self.bench.devices
        self.at = START
        self.log: list[LogEntry] = []
        self.sent: list[Send] = []
        _, settings = replace(REQUEST, cohort=size).resolve()
        from aggregator.registry.publishing import manifest_of
        from aggregator.rounds.planning import assign, make_plan

        task = assign(settings, manifest_of(self.bench.operator.versions()[0])).task
        plan = make_plan(settings, "orchard", secrets.token_hex(16), task, START)
        self.document = self.bench.authority.sign_plan(plan)
        self.plan = plan
        self.state, outputs = machine.begin(
            plan, self.document, Trust(self.bench.authority.ca), self.devices, START
        )
        self.take(outputs)

    def take(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            if isinstance(output, Log):
                self.log.append(output.entry)
            else:
                self.sent.append(output)

    @property
    def part(self) -> SubcohortState:
        """The one sub-cohort of a round that is not split."""
        (part,) = self.state.subcohorts
        return part

    def feed(self, event: Event) -> None:
        self.state, outputs = machine.handle(self.state, event, self.at)
        self.take(outputs)

    def later(self, seconds: float) -> None:
        self.at = Moment(self.at.clock + seconds, self.at.unix + seconds)

    def answers(self, message: Send) -> list[Event]:
        """What a device answers; an upload counts as stored at once."""
        from protocol.codec import encode

        events: list[Event] = []
        for _, frame in self.devices[message.device_id].receive(encode(message.message)):
            answer, _ = decode_from_device(frame)
            if isinstance(answer, UploadOffer):
                events.append(MaskedInputStored(message.device_id))
            else:
                events.append(MessageReceived(message.device_id, answer))  # type: ignore[arg-type]
        return events

    def pump(self, *, steps: int = 1000) -> None:
        """Hands requests to devices and answers to the machine, until nothing is left to hand over."""
        for _ in range(steps):
            if not self.sent:
                return
            for event in self.answers(self.sent.pop(0)):
                try:
                    self.feed(event)
                except IllegalEvent:
                    continue

    def replayed(self) -> RoundState:
        return machine.resume(
            self.plan,
            self.document,
            Trust(self.bench.authority.ca),
            list(self.devices),
            self.log,
            START.unix,
            self.at,
        )


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path)
    yield table
    table.bench.close()


def comparable(state: RoundState) -> tuple[Any, ...]:
    """All of a state but what a restart does not keep: clocks, presence and repeats."""
    return tuple(
        (part.secagg, part.owed, part.closed, part.cohort, part.survivors_hash, part.survivors)
        for part in state.subcohorts
    )


def test_the_log_replays_to_the_same_state_after_every_event(table: Table) -> None:
    seen = 0
    while table.sent:
        table.pump(steps=1)
        table.later(0.1)
        if len(table.log) > seen:
            seen = len(table.log)
            assert comparable(table.replayed()) == comparable(table.state)
    assert table.state.answered and table.state.ended and not table.state.completes
    recovered = machine.recover(table.state)
    assert isinstance(recovered.subcohorts[0].secagg, Recovered) and recovered.completes
    assert machine.recover(recovered) == recovered
    # Four devices with four messages and an input each, and five phases.
    assert len(table.log) == 4 * 5 + 5


def test_a_phase_that_a_restart_interrupts_gets_its_whole_time_again(table: Table) -> None:
    table.later(19)
    assert table.replayed().subcohorts[0].opened.clock == table.at.clock


def test_nobody_is_online_after_a_restart_until_a_birth_says_so(table: Table) -> None:
    table.state = table.replayed()
    table.sent.clear()
    table.later(3)
    table.feed(Tick())
    assert table.sent == []
    table.feed(DeviceOnline("device-1"))
    assert [send.device_id for send in table.sent] == ["device-1"]


def test_repeated_answers_are_not_logged(table: Table) -> None:
    (answer,) = table.answers(table.sent[0])
    for _ in range(3):
        table.feed(answer)
    assert len(table.log) == 1
    refusal = MessageReceived("device-3", Refusal(round_id=table.plan.round_id, code="policy"))
    for _ in range(3):
        table.feed(refusal)
    assert len(table.log) == 2


def test_events_that_are_not_owed_raise_and_change_nothing(table: Table) -> None:
    stranger = MessageReceived("stranger", Refusal(round_id=table.plan.round_id, code="policy"))
    elsewhere = MessageReceived("device-0", ClientAbort(round_id="f" * 32, code="policy"))
    early = MaskedInputStored("device-0")
    (answer,) = table.answers(table.sent[0])
    assert isinstance(answer, MessageReceived)
    assert isinstance(answer.message, AdvertiseKeys)
    forged = MessageReceived("device-0", answer.message.model_copy(update={"mask_key": bytes(32)}))
    foreign = MessageReceived("device-1", answer.message)
    for event in (stranger, elsewhere, early, forged, foreign):
        before = table.state
        with pytest.raises(ProtocolError):
            table.feed(event)
        assert table.state is before
    assert table.log == []


def test_nothing_is_taken_in_after_the_end(table: Table) -> None:
    table.pump()
    assert table.state.ended
    for event in (
        MessageReceived("device-0", Refusal(round_id=table.plan.round_id, code="policy")),
        MaskedInputStored("device-0"),
    ):
        with pytest.raises(IllegalEvent):
            table.feed(event)
    log = list(table.log)
    for event in (Tick(), DeviceOnline("device-0"), DeviceOffline("device-0"), DeviceHeard("device-0")):
        table.feed(event)
    assert table.log == log
    assert not machine.expects(table.state, "device-0")


def test_a_plan_that_expires_ends_the_phase(table: Table) -> None:
    """Outages stop a phase's clock, but devices forget a round when its plan expires."""
    table.at = Moment(1.0, float(table.plan.expires_at))
    table.feed(Tick())
    assert isinstance(table.part.secagg, Failed)


def test_an_outage_does_not_count(table: Table) -> None:
    table.later(100)
    table.feed(Reconnected(outage=100))
    table.feed(Tick())
    assert not table.state.ended
    table.later(19.9)
    table.feed(Tick())
    assert not table.state.ended
    table.later(0.2)
    table.feed(Tick())
    assert table.state.ended


def test_a_device_that_is_busy_is_not_asked_again_yet(table: Table) -> None:
    table.sent.clear()
    for _ in range(10):
        table.later(1.5)
        table.feed(DeviceHeard("device-0"))
        table.feed(Tick())
    asked = [send.device_id for send in table.sent]
    assert "device-0" not in asked
    assert "device-1" in asked


def test_the_request_while_checking_in_is_the_signed_plan(table: Table) -> None:
    request = machine.request(table.state, "device-0")
    assert request == Invitation(plan=table.document)


# --- selection


def test_a_draw_depends_on_the_seed_and_the_names_alone() -> None:
    devices = [f"d-{i}" for i in range(30)]
    drawn = select(devices, 10, b"seed")
    assert drawn == select(reversed(devices), 10, b"seed")
    assert len(drawn) == len(set(drawn)) == 10
    assert drawn != select(devices, 10, b"another")
    assert select(devices[:3], 10, b"seed") == ("d-0", "d-1", "d-2")


def test_every_device_is_drawn_about_as_often() -> None:
    """300 of 3,000 draws of 10 out of 100; the bounds are 6 standard deviations away."""
    devices = [f"d-{i}" for i in range(100)]
    counts = dict.fromkeys(devices, 0)
    for number in range(3000):
        for device in select(devices, 10, number.to_bytes(4, "big")):
            counts[device] += 1
    assert all(200 < count < 400 for count in counts.values())


@pytest.mark.parametrize(
    ("online", "waited", "expected"),
    [(10, 0, True), (12, 0, True), (9, 0, False), (9, 3, True), (6, 3, True), (5, 99, False)],
)
def test_a_round_starts_full_at_once_or_with_the_minimum_after_a_while(
    online: int, waited: float, expected: bool
) -> None:
    assert ready(online, minimum=6, size=10, waited=waited, patience=3) is expected


# --- the partial sum


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    repository = sqlite_repository(tmp_path / "aggregator.db")
    with repository.write() as writer:
        writer.add_campaign(Campaign("c" * 32, "toy", 1, b"{}", 0.0))
        writer.begin_round(Round("a" * 32, "c" * 32, 1, "toy", 1, b"", b"", (), 0.0))
    yield repository
    repository.close()


def encoding_of(length: int, bits: int) -> EncodingParameters:
    _, settings = CampaignRequest("toy", cohort=3, bits=bits).resolve()
    privacy = settings.privacy.model_copy(update={"metric_slots": ()})
    return derive_encoding(
        privacy, dimension=length, minimum_survivors=2, maximum_clients=3, rotation_seed=bytes(32)
    )


def upload(repository: Repository, device: str, data: bytes, blob: BlobRef | None = None) -> BlobRef:
    blob = blob or describe(data)
    with repository.write() as writer:
        writer.open_upload("a" * 32, device, blob)
        for index in range(0, len(data), 1000):
            writer.store_chunk("a" * 32, device, index // 1000, data[index : index + 1000])
    return blob


@pytest.mark.parametrize(("length", "bits"), [(1, 8), (13, 17), (SLICE, 12), (SLICE + 5, 20), (40_000, 32)])
def test_the_sum_is_exact_over_slices(repository: Repository, length: int, bits: int) -> None:
    encoding = encoding_of(length, bits)
    rng = np.random.default_rng(length)
    total = np.zeros(length, np.uint32)
    for device in ("one", "two", "three"):
        vector = rng.integers(0, 2**bits, length, dtype=np.uint32)
        total = ring.add(total, vector, bits)
        packed = ring.pack(vector, bits)
        assert len(packed) == input_size(encoding)
        blob = upload(repository, device, packed)
        with repository.write() as writer:
            add_input(writer, "a" * 32, device, blob, encoding, 0)
    with repository.read() as reader:
        np.testing.assert_array_equal(load_sum(reader, "a" * 32, encoding, 0), total)
        assert reader.uploads("a" * 32) == ()
        assert set(reader.inputs("a" * 32)) == {"one", "two", "three"}


@pytest.mark.parametrize("code", ["wrong-digest", "wrong-padding", "wrong-size"])
def test_an_input_that_cannot_be_used_adds_nothing(repository: Repository, code: str) -> None:
    encoding = encoding_of(13, 17)
    data = ring.pack(np.arange(13, dtype=np.uint32), 17)
    if code == "wrong-padding":
        data = data[:-1] + bytes([data[-1] | 0x80])
    blob = describe(data)
    if code == "wrong-digest":
        blob = BlobRef(sha256="0" * 64, size=blob.size)
    upload(repository, "one", data[:-1] if code == "wrong-size" else data, blob)
    with repository.write() as writer, pytest.raises(UnusableInput) as caught:
        add_input(writer, "a" * 32, "one", blob, encoding, 0)
    assert caught.value.code == code
    with repository.read() as reader:
        assert reader.sum_slice("a" * 32, 0) is None
        assert reader.inputs("a" * 32) == {}


def test_a_sum_of_nothing_is_no_sum(repository: Repository) -> None:
    with repository.read() as reader, pytest.raises(ValueError, match="no slice"):
        load_sum(reader, "a" * 32, encoding_of(13, 17), 0)


# --- settings


def test_what_is_not_said_follows_from_recipe_and_cohort() -> None:
    rounds, settings = CampaignRequest("watch", cohort=10).resolve()
    from models.recipes import WATCH

    assert rounds == WATCH.rounds
    assert isinstance(settings.asks, TrainingParameters)
    assert settings.asks.local_epochs == WATCH.local_epochs
    assert settings.asks.learning_rate == WATCH.learning_rate
    assert settings.privacy.clip_norm == WATCH.clip_norm
    assert settings.privacy.bits == 20
    assert (settings.cohort.minimum, settings.cohort.minimum_survivors) == (7, 7)
    assert settings.privacy.noise_multiplier == 0
    _, private = CampaignRequest("watch", privacy=PrivacyMode.DISTRIBUTED).resolve()
    assert private.privacy.noise_multiplier == 1


def test_mode_example_leaves_the_noise_to_the_devices() -> None:
    _, settings = CampaignRequest(
        "watch", privacy=PrivacyMode.EXAMPLE, noise_multiplier=2.0, sampling_probability=0.25
    ).resolve()
    privacy = settings.privacy
    assert privacy.noise_multiplier == 0 and privacy.example is not None
    assert (privacy.example.noise_multiplier, privacy.example.sampling_probability) == (2.0, 0.25)
    assert [slot.name for slot in privacy.metric_slots] == ["examples"]
    check_settings(settings, zoo.load("watch").manifest)
    plain = zoo.load("watch").manifest.model_copy(
        update={"signatures": zoo.load("watch").manifest.signatures[:4]}
    )
    with pytest.raises(ValueError, match="example_gradients=True"):
        check_settings(settings, plain)


def test_settings_survive_storage_and_a_seed_makes_them_repeatable() -> None:
    _, settings = CampaignRequest("watch", seed=5).resolve()
    assert CampaignSettings.from_bytes(settings.to_bytes()) == settings
    assert settings == CampaignRequest("watch", seed=5).resolve()[1]
    assert settings != CampaignRequest("watch").resolve()[1]
    with pytest.raises(ProtocolError):
        CampaignSettings.from_bytes(b"{}")


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": 1},
        {"cohort": 0},
        {"cohort": 5, "minimum": 6},
        {"min_survivors": 9, "minimum": 8},
        {"rounds": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"clip_norm": 0.0},
        {"delta": 1.5},
        {"bits": 4},
        {"privacy": PrivacyMode.NONE, "noise_multiplier": 1.0},
        {"privacy": PrivacyMode.CENTRAL, "noise_multiplier": 0.0},
        {"gather_seconds": -1.0},
        {"epsilon_limit": 0.0},
        {"sampling_probability": 0.1},
        {"privacy": PrivacyMode.EXAMPLE, "epsilon_limit": 4.0},
        {"privacy": PrivacyMode.EXAMPLE, "sampling_probability": 0.0},
        {"privacy": PrivacyMode.EXAMPLE, "example_clip_norm": 0.0},
        {"privacy": PrivacyMode.EXAMPLE, "noise_multiplier": 0.0},
    ],
)
def test_figures_that_make_no_campaign_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings):
        CampaignRequest("watch", **changes).resolve()


def test_rounds_are_planned_for_an_aggregator_that_grinds_rosters() -> None:
    _, settings = CampaignRequest("watch", cohort=1_000).resolve()
    assert parameters(1_000, settings.cohort.graph).degree == 120


def test_colluders_leave_the_others_noise_enough() -> None:
    """With c of m survivors' noise told, the other m - c shares have the variance that m had."""
    base = CampaignRequest("watch", cohort=12, minimum=10, min_survivors=10, privacy=PrivacyMode.DISTRIBUTED)
    variances = []
    for colluders in (0, 4):
        _, settings = replace(base, colluders=colluders).resolve()
        encoding = derive_encoding(
            settings.privacy,
            dimension=1000,
            minimum_survivors=10,
            maximum_clients=12,
            rotation_seed=bytes(32),
        )
        assert event_for(encoding, 10).colluders == colluders
        variances.append((10 - colluders) * encoding.local_variance / encoding.norm_bound_squared)
    assert variances == pytest.approx([1.0, 1.0])
    with pytest.raises(InvalidSettings, match="distributed"):
        replace(base, privacy=PrivacyMode.CENTRAL, colluders=1).resolve()
