"""The whole aggregator without a network: rounds complete, sums are exact, cohorts are drawn fairly."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from aggregator.rounds.planning import CampaignSettings
from models.weights import decode_weights
from protocol import topics, transcript
from protocol.codec import decode_from_device, decode_to_device, encode
from protocol.columns import ShareColumn
from protocol.dp.events import event_for
from protocol.dp.parameters import PrivacyMode
from protocol.identity import DeviceCertificate, SignedDocument
from protocol.messages import ModelAnnouncement, UnmaskingShares
from protocol.plan import MODEL_KIND, Plan
from protocol.round_encoding import round_encoding
from protocol.secagg import certificates
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing, model_files
from tests.toy_rounds import PHASES, REQUEST, check_completed, request

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
