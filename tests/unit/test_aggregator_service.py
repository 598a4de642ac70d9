"""The whole aggregator without a network: rounds complete, sums are exact, mishaps end as they should."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from aggregator.downloads import BURST_BYTES, DownloadLimits
from aggregator.fleet.authority import Authority
from aggregator.optimizers import FedAvg
from aggregator.round_operations import RoundView
from aggregator.rounds.events import Event, Tick
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.report import PhaseReport
from aggregator.running import RunningRound
from aggregator.settings import CampaignRequest
from aggregator.work import Work
from models.weights import decode_weights
from protocol import ring, topics, transcript
from protocol.codec import decode_from_device, decode_to_device, encode
from protocol.columns import ShareColumn
from protocol.dp.events import event_for
from protocol.dp.mechanism import decode
from protocol.dp.parameters import PrivacyMode
from protocol.identity import DeviceCertificate, SignedDocument
from protocol.messages import (
    CHUNK_BYTES,
    AdvertiseKeys,
    BlobChunk,
    BlobNeed,
    ClientAbort,
    ModelAnnouncement,
    Refusal,
    RoundEnd,
    UnmaskingShares,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import MODEL_KIND, Deadlines, Plan, TrainTask
from protocol.round_encoding import round_encoding
from protocol.secagg import certificates
from protocol.transfer import describe
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing, SimulatedDevice, model_files, toy_input

REQUEST = CampaignRequest(
    "toy",
    rounds=1,
    cohort=5,
    minimum=3,
    min_survivors=3,
    deadlines=Deadlines(
        advertise_keys=20, share_keys=20, masked_input=60, consistency_check=20, unmasking=20, offline_grace=5
    ),
)
PHASES = ["AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"]


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


def request(**changes: object) -> CampaignRequest:
    return CampaignRequest(**{**vars(REQUEST), **changes})  # type: ignore[arg-type]


def expected_weights(bench: Bench, view: RoundView) -> NDArray[np.float32]:
    """What FedAvg must give: the base and the plain sum of the survivors' integers, without any masks."""
    document = SignedDocument.model_validate_json(view.record.plan)
    plan = Plan.from_bytes(document.payload)
    encoding = round_encoding(plan, document.digest, bench.parameters)
    total = np.zeros(encoding.length, np.uint32)
    for device_id in view.report.survivors:
        ring.add(total, toy_input(device_id, encoding), encoding.bits, out=total)
    mean, metrics = decode(total, len(view.report.survivors), encoding)
    assert view.report.metrics == metrics
    assert isinstance(plan.task, TrainTask)
    base = bench.operator.model("toy", plan.task.base_version)
    state = FedAvg().init(decode_weights(base.weights, base.manifest))
    return FedAvg().apply(state, mean).parameters


def check_completed(bench: Bench, view: RoundView) -> None:
    """The round completed, and its version is the exact sum of the survivors."""
    assert view.record.status == "completed", (view.record.code, view.record.detail)
    assert view.record.version is not None
    model = bench.operator.model("toy", view.record.version)
    weights = decode_weights(model.weights, model.manifest)
    np.testing.assert_array_equal(weights, expected_weights(bench, view))


def phase(view: RoundView, name: str) -> PhaseReport:
    return next(each for each in view.report.phases if each.phase == name)


# --- rounds that go well


def test_rounds_complete_with_the_exact_sum(bench: Bench) -> None:
    views = bench.finish(bench.start(request(rounds=3)))
    assert [view.record.version for view in views] == [2, 3, 4]
    assert [view.record.base_version for view in views] == [1, 2, 3]
    for view in views:
        check_completed(bench, view)
        assert [each.phase for each in view.report.phases] == PHASES
        assert all(each.answered == each.expected == 5 and not each.dropped for each in view.report.phases)
        assert all(each.ended is not None and each.ended >= each.started for each in view.report.phases)
        assert view.report.survivors == tuple(sorted(bench.devices))
        assert all(traffic.up > 2000 and traffic.down > 2000 for traffic in view.report.traffic.values())
    for device in bench.devices.values():
        assert [end.completed for end in device.ends.values()] == [True] * 3


def test_a_certificate_is_verified_once_for_all_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    verify = certificates.verify_certificate

    def counted(certificate: bytes, ca: bytes, *, now: int) -> DeviceCertificate:
        seen.append(certificate)
        return verify(certificate, ca, now=now)

    monkeypatch.setattr(certificates, "verify_certificate", counted)
    views = bench.finish(bench.start(request(rounds=3)))
    assert [view.record.version for view in views] == [2, 3, 4]
    # Devices of these tests remember nothing: what is left is the aggregator's share.
    own = [device.bundle.certificate for device in bench.devices.values()]
    assert all(seen.count(certificate) == 1 + 4 * 3 for certificate in own)


def test_uploads_of_many_chunks_and_slices_sum_exactly(wide: Bench) -> None:
    (view,) = wide.finish(wide.start(REQUEST))
    check_completed(wide, view)


def test_the_new_version_is_announced_signed(bench: Bench) -> None:
    bench.finish(bench.start(REQUEST))
    message, _ = decode_to_device(bench.transport.retained[topics.model("toy")])
    assert isinstance(message, ModelAnnouncement)
    assert message.manifest is not None
    signers = next(iter(bench.devices.values())).bundle.model_keys()
    payload = message.manifest.open(MODEL_KIND, signers)
    assert payload == bench.operator.model("toy", 2).manifest.to_bytes()


def test_the_transcripts_of_all_rounds_chain(bench: Bench) -> None:
    views = bench.finish(bench.start(request(rounds=2)))
    head = transcript.GENESIS
    with bench.repository.read() as reader:
        for view in views:
            records = reader.transcript(view.record.round_id)
            parsed = transcript.verify(records, head)
            kinds = [record.content.kind for record in parsed]
            assert kinds == ["plan", "roster", "survivors", "privacy", "release", "version"]
            head = transcript.digest(records[-1])
        assert reader.transcript_head() == records[-1]
        assert len(reader.ledger("toy")) == 2


def test_nothing_of_a_round_is_left_in_storage(wide: Bench) -> None:
    (view,) = wide.finish(wide.start(REQUEST))
    with wide.repository.read() as reader:
        assert reader.log(view.record.round_id) == ()
        assert reader.uploads(view.record.round_id) == ()
        assert reader.inputs(view.record.round_id) == {}
        assert reader.sum_slice(view.record.round_id, 0) is None


@pytest.mark.parametrize("mode", [PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED])
def test_a_private_round_states_what_it_cost(bench: Bench, mode: PrivacyMode) -> None:
    views = bench.finish(bench.start(request(rounds=2, privacy=mode, noise_multiplier=4.0)))
    first, second = (view.report.epsilon for view in views)
    assert first is not None
    assert second is not None
    assert 0 < first < second < 20
    with bench.repository.read() as reader:
        event = reader.ledger("toy")[0].event
    plan_document = SignedDocument.model_validate_json(views[0].record.plan)
    plan = Plan.from_bytes(plan_document.payload)
    encoding = round_encoding(plan, plan_document.digest, bench.parameters)
    assert event == event_for(encoding, 5).model_dump_json().encode()
    for view in views:
        for name, noise in view.report.metric_noise.items():
            assert 0.5 < noise < 20
            # Metrics are 0 up to 1/64 of their bound here: what is reported is noise; 6 standard deviations.
            assert abs(view.report.metrics[name]) < 6 * noise + 0.1


def test_central_noise_is_fresh_and_reaches_the_version(tmp_path: Path) -> None:
    """Twice the same inputs give two different versions, as far apart as the noise is wide."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name)
        (view,) = bench.finish(bench.start(request(privacy=PrivacyMode.CENTRAL, noise_multiplier=1.0)))
        assert view.record.version == 2
        model = bench.operator.model("toy")
        found.append(decode_weights(model.weights, model.manifest))
        bench.close()
    assert np.count_nonzero(found[0] == found[1]) < 50


def test_the_budget_gate_stops_a_campaign_before_its_round(bench: Bench) -> None:
    campaign = bench.start(
        request(rounds=50, privacy=PrivacyMode.DISTRIBUTED, noise_multiplier=4.0, epsilon_limit=3.0)
    )
    views = bench.finish(campaign)
    ended = bench.operator.campaign(campaign.campaign_id)
    assert ended.status == "failed"
    assert "budget gate" in ended.note
    assert 1 < len(views) < 50
    last = views[-1].report.epsilon
    assert last is not None
    assert 1.5 < last <= 3.0


def test_the_budget_gate_counts_what_running_rounds_are_going_to_spend(tmp_path: Path) -> None:
    """Two models train at the same time; the budget has room for one of the two rounds."""
    bench = Bench(tmp_path, devices=6)
    bench.operator.publish(*model_files(1000, name="other"))
    settings = {"cohort": 3, "privacy": PrivacyMode.DISTRIBUTED, "noise_multiplier": 4.0, "gather_seconds": 0}
    for device in bench.devices.values():
        device.mute = {"upload-offer"}
    bench.start(request(**settings, epsilon_limit=3.0))
    bench.run_until(lambda: bench.phase() == "MaskedInput")
    second = bench.start(request(model="other", **settings, epsilon_limit=1.3))
    bench.run_until(lambda: bench.operator.campaign(second.campaign_id).status != "waiting")
    assert bench.operator.campaign(second.campaign_id).status == "failed"
    assert "budget gate" in bench.operator.campaign(second.campaign_id).note
    for device in bench.devices.values():
        device.mute = set()
    bench.run_until(lambda: not bench.operator.campaigns(active=True))
    (view,) = bench.rounds()
    assert view.report.epsilon is not None
    # Alone it would have fitted.
    assert view.report.epsilon < 1.3
    bench.close()


# --- selection


def test_a_round_waits_for_the_minimum_and_then_a_little_for_the_rest(bench: Bench) -> None:
    bench.hang_up("device-0", "device-1", "device-2")
    bench.step()
    campaign = bench.start(request(gather_seconds=3.0))
    for _ in range(100):
        bench.step()
    assert bench.rounds() == []
    assert "2 of at least 3 online" in bench.operator.campaign(campaign.campaign_id).note
    bench.come_back("device-0")
    for _ in range(25):
        bench.step()
    assert bench.rounds() == []
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert view.record.invited == ("device-0", "device-3", "device-4")


def test_a_cohort_is_drawn_by_its_seed(bench: Bench) -> None:
    views = bench.finish(bench.start(request(rounds=4, cohort=3, seed=7, rest_rounds=0)))
    settings = CampaignSettings.from_bytes(bench.operator.campaigns()[0].settings)
    for view in views:
        seed = settings.round_seed(view.record.number)
        assert view.record.selection_seed == seed
        order = sorted(bench.devices, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
        assert view.record.invited == tuple(sorted(order[:3]))
    assert len({view.record.invited for view in views}) > 1


def test_excluded_devices_are_not_selected(bench: Bench) -> None:
    bench.operator.exclude("device-3", "noisy")
    (view,) = bench.finish(bench.start(REQUEST))
    assert "device-3" not in view.record.invited
    bench.operator.exclude("device-3", None)
    (view,) = bench.finish(bench.start(REQUEST))
    assert "device-3" in view.record.invited


def test_a_device_that_lies_is_excluded_until_an_operator_lets_it_in_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=10)
    liar = bench.devices["device-3"]

    def lie(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if topic != topics.up(liar.device_id, "msg"):
            return [message]
        said, _ = decode_from_device(frame)
        if not isinstance(said, UnmaskingShares):
            return [message]
        forged = ShareColumn.of(dict.fromkeys(said.shares.indices(), bytes(33)))
        return [(topic, encode(said.model_copy(update={"shares": forged})))]

    bench.filter = lie
    (first,) = bench.finish(bench.start(request(cohort=10, minimum=7)))
    check_completed(bench, first)
    assert first.report.misbehaved == first.report.excluded == ("device-3",)
    reason = next(d.excluded for d in bench.operator.devices() if d.device_id == "device-3")
    assert reason is not None
    assert first.record.round_id in reason
    bench.filter = lambda message: [message]
    (second,) = bench.finish(bench.start(request(cohort=10, minimum=7)))
    assert "device-3" not in second.record.invited
    bench.operator.exclude("device-3", None)
    (third,) = bench.finish(bench.start(request(cohort=10, minimum=7)))
    assert "device-3" in third.report.survivors
    assert third.report.excluded == ()
    bench.close()


def test_campaigns_of_one_model_take_turns(bench: Bench) -> None:
    first, second = bench.start(request(rounds=2)), bench.start(request(rounds=1))
    bench.finish(second)
    assert bench.operator.campaign(first.campaign_id).status == "finished"
    assert [view.record.campaign_id for view in bench.rounds()] == [
        first.campaign_id,
        first.campaign_id,
        second.campaign_id,
    ]
    assert [view.record.version for view in bench.rounds()] == [2, 3, 4]


# --- dropouts

DROPS = {
    "AdvertiseKeys": "advertise-keys",
    "ShareKeys": "share-keys",
    "MaskedInput": "upload-offer",
    "ConsistencyCheck": "consistency-signature",
    "Unmasking": "unmasking-shares",
}


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_stays_silent_is_waited_for_until_the_deadline(bench: Bench, when: str) -> None:
    bench.devices["device-2"].mute = {DROPS[when]}
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ("device-2",)
    assert report.ended is not None
    deadline = 60 if when == "MaskedInput" else 20
    assert deadline <= report.ended - report.started < deadline + 1
    survives = when in ("ConsistencyCheck", "Unmasking")
    assert ("device-2" in view.report.survivors) == survives


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_goes_offline_is_waited_for_no_longer_than_its_grace(bench: Bench, when: str) -> None:
    device = bench.devices["device-2"]
    device.mute = {DROPS[when]}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == when)
    bench.hang_up("device-2")
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ("device-2",)
    assert report.ended is not None
    assert 5 <= report.ended - report.started < 6


@pytest.mark.parametrize("when", PHASES)
def test_a_device_that_comes_back_in_time_is_asked_at_once(bench: Bench, when: str) -> None:
    device = bench.devices["device-2"]
    device.mute = {DROPS[when]}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == when)
    bench.hang_up("device-2")
    for _ in range(20):
        bench.step()
    device.mute = set()
    bench.come_back("device-2")
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    report = phase(view, when)
    assert report.dropped == ()
    assert report.ended is not None
    assert report.ended - report.started < 4.5


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("advertise-keys", "too-few-check-ins"),
        ("share-keys", "too-few-shares"),
        ("upload-offer", "too-few-survivors"),
        ("consistency-signature", "too-few-signatures"),
        ("unmasking-shares", "unmasking-failed"),
    ],
)
def test_too_many_dropouts_abort_the_round_and_the_next_one_runs(
    bench: Bench, message: str, code: str
) -> None:
    campaign = bench.start(request(rounds=2))
    for name in ("device-0", "device-1", "device-2"):
        bench.devices[name].mute = {message}
    bench.run_until(lambda: len(bench.rounds()) == 2)
    for device in bench.devices.values():
        device.mute = set()
    first, second = bench.finish(campaign)
    assert (first.record.status, first.record.code) == ("aborted", code)
    assert first.record.version is None
    check_completed(bench, second)
    assert second.record.version == 2
    with bench.repository.read() as reader:
        spent = {entry.round_id for entry in reader.ledger()}
    # Once devices were asked to unmask, the sum counts as released.
    assert (first.record.round_id in spent) == (code == "unmasking-failed")


def test_when_too_few_are_left_the_others_get_the_whole_time_to_come_back(bench: Bench) -> None:
    gone = ("device-0", "device-1", "device-2")
    for name in gone:
        bench.devices[name].mute = {"upload-offer"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "MaskedInput")
    bench.hang_up(*gone)
    for _ in range(300):
        bench.step()
    assert bench.phase() == "MaskedInput"
    for name in gone:
        bench.devices[name].mute = set()
    bench.come_back(*gone)
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert len(view.report.survivors) == 5


def test_a_device_that_refuses_is_not_waited_for(bench: Bench) -> None:
    def refuse(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if "device-1/" in topic and b'"advertise-keys"' in frame[:120]:
            plan = bench.devices["device-1"].plan
            assert plan is not None
            return [(topic, encode(ClientAbort(round_id=plan.round_id, code="policy")))]
        return [message]

    bench.filter = refuse
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    report = phase(view, "AdvertiseKeys")
    assert report.dropped == ("device-1",)
    assert report.ended is not None
    assert report.ended - report.started < 1
    assert view.report.declined == {"device-1": "policy"}


def test_a_round_that_everybody_refuses_says_why(bench: Bench) -> None:
    def refuse(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if b'"advertise-keys"' not in frame[:120]:
            return [message]
        plan = bench.devices[topic.split("/")[3]].plan
        assert plan is not None
        return [(topic, encode(Refusal(round_id=plan.round_id, code="epsilon", detail="35 over\x1b[31m 30")))]

    bench.filter = refuse
    (view,) = bench.finish(bench.start(REQUEST))
    assert view.record.status == "aborted"
    assert view.record.code == "too-few-check-ins"
    assert view.record.detail.endswith("; 5 declined, 5 of them: epsilon: 35 over [31m 30")


def test_a_round_that_stumbles_is_given_up_and_the_next_one_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = RunningRound.apply

    def stumble(running: RunningRound, work: Work, event: Event) -> None:
        if (
            running.record.number == 1
            and isinstance(event, Tick)
            and running.state.subcohorts[0].cohort is not None
        ):
            raise RuntimeError("a defect")
        apply(running, work, event)

    monkeypatch.setattr(RunningRound, "apply", stumble)
    first, second = bench.finish(bench.start(replace(REQUEST, rounds=2)))
    assert (first.record.status, first.record.code) == ("aborted", "defect")
    assert first.record.detail.startswith("RuntimeError")
    check_completed(bench, second)


# --- a network that repeats, loses and reorders


def test_every_message_twice_changes_nothing(wide: Bench) -> None:
    wide.filter = lambda message: [message, message]
    (view,) = wide.finish(wide.start(REQUEST))
    check_completed(wide, view)
    assert len(view.report.survivors) == 5


def test_a_network_that_loses_repeats_and_reorders_loses_nothing(wide: Bench) -> None:
    chance = np.random.default_rng(5)

    def shake(message: Outgoing) -> list[Outgoing]:
        if message[0].endswith("status"):
            return [message]
        kept = [message] * int(chance.choice([0, 1, 1, 1, 2]))
        for each in kept[1:]:
            wide.later(float(chance.uniform(0, 8)), each)
        if kept and chance.random() < 0.2:
            wide.later(float(chance.uniform(0, 8)), kept[0])
            return []
        return kept[:1]

    wide.filter = shake
    # Every phase is long enough that only loss for ever would make a dropout.
    deadlines = Deadlines(
        advertise_keys=200, share_keys=200, masked_input=600, consistency_check=200, unmasking=200
    )
    views = wide.finish(wide.start(request(rounds=3, deadlines=deadlines)))
    for view in views:
        check_completed(wide, view)
        assert len(view.report.survivors) == 5


def test_requests_are_repeated_at_growing_intervals(bench: Bench) -> None:
    bench.devices["device-0"].mute = {"advertise-keys"}
    bench.start(REQUEST)
    for _ in range(150):
        bench.step()
    heard = bench.devices["device-0"].received.count("invitation")
    assert 4 <= heard <= 7


def test_messages_of_a_round_that_is_over_are_answered_with_its_end(bench: Bench) -> None:
    (view,) = bench.finish(bench.start(REQUEST))
    device = bench.devices["device-0"]
    device.ends.clear()
    offer = UploadOffer(round_id=view.record.round_id, blob=describe(b"late"))
    bench.deliver((topics.up("device-0", "msg"), encode(offer)))
    bench.step()
    assert device.ends == {
        view.record.round_id: RoundEnd(round_id=view.record.round_id, completed=True, reason="")
    }
    stranger = UploadOffer(round_id="e" * 32, blob=describe(b"late"))
    bench.deliver((topics.up("device-0", "msg"), encode(stranger)))
    bench.step()
    assert device.ends["e" * 32].reason == "unknown-round"


def test_a_device_that_missed_the_end_is_told_at_its_birth(bench: Bench) -> None:
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "Unmasking")
    bench.hang_up("device-0")
    (view,) = bench.finish(campaign)
    device = bench.devices["device-0"]
    device.ends.clear()
    bench.come_back("device-0")
    bench.step()
    assert device.ends[view.record.round_id].completed


def test_a_device_that_came_too_late_is_told_that_it_has_no_part(bench: Bench) -> None:
    late: list[Outgoing] = []

    def hold(message: Outgoing) -> list[Outgoing]:
        if "device-4/" in message[0] and b'"advertise-keys"' in message[1][:120]:
            late.append(message)
            return []
        return [message]

    bench.filter = hold
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    bench.filter = lambda message: [message]
    bench.devices["device-0"].mute = {"share-keys"}
    bench.deliver(late[0])
    bench.step()
    (end,) = bench.devices["device-4"].ends.values()
    assert end.reason == "not-in-round"
    (view,) = bench.finish(campaign)
    assert "device-4" not in view.report.survivors


def test_strangers_are_ignored(bench: Bench) -> None:
    stranger = Authority.create("orchard", now=1_800_000_000, serial=2)
    assert stranger.ca != bench.authority.ca
    for topic in (topics.up("stranger", "status"), topics.up("stranger", "msg"), "covey/v1/else"):
        offer = UploadOffer(round_id="e" * 32, blob=describe(b"x"))
        bench.deliver((topic, encode(offer)), (topic, b""), (topic, b"garbage"))
    bench.deliver((topics.up("device-0", "chunk"), encode(offer)))  # on a wrong channel
    bench.deliver((topics.up("device-0", "msg"), b"\xff" * 100))
    bench.step()
    assert bench.transport.unacknowledged == []
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)


def test_a_device_cannot_check_in_as_another(bench: Bench) -> None:
    """The broker vouches for the topic; the certificate must say the same."""

    def impersonate(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if topic == topics.up("device-0", "msg") and b'"advertise-keys"' in frame[:120]:
            return [message, (topics.up("device-1", "msg"), frame)]
        if topic == topics.up("device-1", "msg") and b'"advertise-keys"' in frame[:120]:
            return []
        return [message]

    bench.filter = impersonate
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    assert view.report.survivors == ("device-0", "device-2", "device-3", "device-4")


# --- uploads


def _intercept_offer(bench: Bench, name: str, change: Callable[[SimulatedDevice], bytes]) -> None:
    """Changes what a device uploads, just before it offers it."""

    def apply(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        device = bench.devices[name]
        if topic == topics.up(name, "msg") and b'"upload-offer"' in frame[:120] and device.plan is not None:
            device.blob = change(device)
            offer = UploadOffer(round_id=device.plan.round_id, blob=describe(device.blob))
            return [(topic, encode(offer))]
        return [message]

    bench.filter = apply


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda device: device.blob[:-1], "wrong-size"),
        (lambda device: device.blob + b"\0", "wrong-size"),
        (lambda device: device.blob * 2, "wrong-size"),
    ],
)
def test_an_input_of_another_size_is_refused_and_not_waited_for(
    bench: Bench, change: Callable[[SimulatedDevice], bytes], code: str
) -> None:
    original: dict[str, bytes] = {}

    def once(device: SimulatedDevice) -> bytes:
        original.setdefault(device.device_id, device.blob)
        device_blob = device.blob
        device.blob = original[device.device_id]
        result = change(device)
        device.blob = device_blob
        return result

    _intercept_offer(bench, "device-1", once)
    (view,) = bench.finish(bench.start(REQUEST))
    check_completed(bench, view)
    assert "device-1" not in view.report.survivors
    assert bench.devices["device-1"].refused[0].code == code
    report = phase(view, "MaskedInput")
    assert report.dropped == ("device-1",)
    assert report.ended is not None
    assert report.ended - report.started < 2


def test_content_that_is_not_what_was_offered_is_refused(wide: Bench) -> None:
    """A sender that lies about its digest: the checksums of its chunks are right, the whole is not."""
    import zlib

    def corrupt(message: Outgoing) -> list[Outgoing]:
        topic, frame = message
        if topic != topics.up("device-1", "chunk"):
            return [message]
        size = int.from_bytes(frame[:4], "little")
        chunk = BlobChunk.model_validate_json(frame[4 : 4 + size])
        body = bytes([frame[4 + size] ^ 1]) + frame[5 + size :]
        return [(topic, encode(chunk.model_copy(update={"crc32": zlib.crc32(body)}), body))]

    wide.filter = corrupt
    (view,) = wide.finish(wide.start(REQUEST))
    check_completed(wide, view)
    assert "device-1" not in view.report.survivors
    assert wide.devices["device-1"].refused[0].code == "wrong-digest"


def test_an_accepted_input_gets_its_receipt_again_and_another_one_is_refused(bench: Bench) -> None:
    bench.devices["device-0"].mute = {"upload-offer"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: len(bench.operator.live_rounds()[:1]) == 1 and bench.devices["device-1"].accepted)
    device = bench.devices["device-1"]
    assert device.plan is not None
    round_id, blob = device.plan.round_id, describe(device.blob)
    bench.transport.sent.clear()
    for offered in (blob, describe(b"y" * blob.size)):
        bench.deliver((topics.up("device-1", "msg"), encode(UploadOffer(round_id=round_id, blob=offered))))
    bench.clock.now += 0.1
    bench.service.step(0)
    answers = [decode_to_device(frame)[0] for topic, frame in bench.transport.sent if "device-1/" in topic]
    receipts = [answer for answer in answers if isinstance(answer, UploadReceipt)]
    assert [(receipt.accepted, receipt.code) for receipt in receipts] == [
        (True, "stored"),
        (False, "another-stored"),
    ]
    bench.devices["device-0"].mute = set()
    (view,) = bench.finish(campaign)
    check_completed(bench, view)


def test_an_offer_after_the_phase_is_refused(bench: Bench) -> None:
    device = bench.devices["device-1"]
    device.mute = {"upload-offer"}
    for other in bench.devices.values():
        if other is not device:
            other.mute = {"consistency-signature"}
    campaign = bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "ConsistencyCheck")
    device.mute = set()
    bench.deliver(*device.repeat())
    bench.step()
    assert [receipt.code for receipt in device.refused] == ["too-late"]
    for other in bench.devices.values():
        other.mute = set()
    (view,) = bench.finish(campaign)
    check_completed(bench, view)
    assert "device-1" not in view.report.survivors


def test_chunks_that_nobody_asked_for_are_dropped(bench: Bench) -> None:
    import zlib

    body = b"z" * 100
    chunk = BlobChunk(blob=describe(body), index=0, crc32=zlib.crc32(body))
    bench.start(REQUEST)
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    bench.deliver((topics.up("device-0", "chunk"), encode(chunk, body)))
    bench.step()
    round_id = bench.rounds()[0].record.round_id
    with bench.repository.read() as reader:
        assert reader.uploads(round_id) == ()


# --- downloads


def test_devices_pull_artefacts_in_bounded_steps(bench: Bench) -> None:
    model = bench.operator.model("toy")
    parts: dict[int, bytes] = {}
    for blob, data in ((model.manifest.graph, model.graph), (model.manifest.weights, model.weights)):
        parts.clear()
        need = BlobNeed(blob=blob, indices=(0, 1, 2, 999))
        bench.deliver((topics.up("device-0", "msg"), encode(need)))
        bench.clock.now += 0.1
        bench.service.step(0)
        for topic, frame in bench.transport.sent:
            if topic == topics.down("device-0", "chunk"):
                message, body = decode_to_device(frame)
                assert isinstance(message, BlobChunk)
                parts[message.index] = bytes(body)
        bench.transport.sent.clear()
        assert b"".join(parts[index] for index in sorted(parts)) == data


def test_a_device_that_asks_without_end_is_served_within_limits(bench: Bench) -> None:
    """Each request is answered with a thousand times its size, which the broker keeps until it is read."""
    blob = bench.operator.model("toy").manifest.graph
    need = encode(BlobNeed(blob=blob, indices=(0,)))
    topic = topics.down("device-0", "chunk")
    burst = BURST_BYTES // CHUNK_BYTES
    for _ in range(3 * burst):
        bench.deliver((topics.up("device-0", "msg"), need))
    bench.deliver((topics.up("device-1", "msg"), need))
    for _ in range(4):
        bench.service.step(0)
    served = [place for place, _ in bench.transport.sent]
    assert served.count(topic) == burst and topics.down("device-1", "chunk") in served
    bench.clock.now += 1.0
    bench.deliver((topics.up("device-0", "msg"), need))
    bench.service.step(0)
    assert [place for place, _ in bench.transport.sent].count(topic) == burst + 1


def test_a_fleet_has_a_download_limit_where_its_operator_sets_one(bench: Bench) -> None:
    bench.downloads = DownloadLimits(device_rate=CHUNK_BYTES, fleet_rate=2 * CHUNK_BYTES)
    bench.boot()
    need = encode(BlobNeed(blob=bench.operator.model("toy").manifest.graph, indices=(0,)))

    def served() -> list[str]:
        bench.transport.sent.clear()
        bench.deliver(*((topics.up(name, "msg"), need) for name in bench.devices))
        bench.service.step(0)
        return [topic for topic, _ in bench.transport.sent if topic.endswith("chunk")]

    assert len(served()) == 2 and served() == []
    bench.clock.now += 0.5
    assert len(served()) == 1
    with pytest.raises(ValidationError):
        DownloadLimits(device_rate=1000)


def test_only_published_artefacts_are_served(bench: Bench) -> None:
    secret = bench.store.put(b"not published")
    bench.deliver((topics.up("device-0", "msg"), encode(BlobNeed(blob=secret, indices=(0,)))))
    bench.service.step(0)
    assert [topic for topic, _ in bench.transport.sent if topic.endswith("chunk")] == []


def test_replayed_check_ins_of_an_earlier_round_are_refused(bench: Bench) -> None:
    seen: list[Outgoing] = []

    def remember(message: Outgoing) -> list[Outgoing]:
        if message[0] == topics.up("device-0", "msg") and b'"advertise-keys"' in message[1][:120]:
            seen.append(message)
        return [message]

    bench.filter = remember
    bench.finish(bench.start(REQUEST))
    old = AdvertiseKeys.model_validate_json(seen[0][1][4:])

    def replay(message: Outgoing) -> list[Outgoing]:
        if message[0] == topics.up("device-0", "msg") and b'"advertise-keys"' in message[1][:120]:
            new = AdvertiseKeys.model_validate_json(message[1][4:])
            forged = old.model_copy(update={"round_id": new.round_id})
            return [(message[0], encode(forged))]
        return [message]

    bench.filter = replay
    (view,) = bench.finish(bench.start(REQUEST))
    assert phase(view, "AdvertiseKeys").dropped == ("device-0",)
