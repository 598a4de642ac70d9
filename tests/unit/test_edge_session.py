"""The device's core in whole rounds against a real secure aggregation server."""

from __future__ import annotations

import numpy as np
import pytest

from edge_client.events import Connected, Fault, TrainingFinished, VersionTested, WorkFailed
from edge_client.outputs import MaskInput, Train
from edge_client.training import LocalUpdate
from protocol.dp.parameters import AdaptiveClipping
from protocol.errors import MalformedMessage
from protocol.messages import (
    AdvertiseKeys,
    BlobNeed,
    ClientAbort,
    ConsistencySignature,
    FromDevice,
    Refusal,
    Roster,
    RoundEnd,
    ShareKeys,
    UnmaskingShares,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import CohortParameters, Plan, TrainingParameters
from protocol.secagg import server
from protocol.transfer import describe
from tests.edge_fleet import (
    NOW,
    PERMISSIVE,
    SIZE,
    Aggregator,
    FakeDevice,
    announcement,
    invitation,
    manifest,
    plan,
    serve,
    weights,
)


def fleet(count: int = 4) -> list[FakeDevice]:
    devices = [FakeDevice(f"device-{i}") for i in range(count)]
    for device in devices:
        device.install()
        device.take()
    return devices


def expected_mean(devices: list[FakeDevice]) -> np.ndarray:
    deltas = []
    for device in devices:
        norm = np.linalg.norm(device.delta)
        deltas.append(device.delta * min(1.0, 10.0 / norm))
    return np.mean(deltas, axis=0)


def test_a_round_gives_the_mean_of_the_clipped_updates() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    end = aggregator.run()
    assert len(end.survivors) == 4
    mean, metrics = aggregator.mean()
    np.testing.assert_allclose(mean, expected_mean(devices), atol=1e-3)
    assert metrics["examples"] == pytest.approx(7, abs=0.01)
    aggregator.end()
    for device in devices:
        assert device.state.active is None
        assert device.disk.closed == {"a" * 32: "completed"}
        assert device.disk.uploads == {}
        assert [item.entry.round_id for item in device.disk.ledger] == ["a" * 32]


def test_a_kill_after_every_step_changes_nothing() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())

    def kill(device: FakeDevice) -> None:
        # After the request, after training and after masking: three kills a phase.
        device.reboot()
        device.work(1)
        device.reboot()
        device.work(2)
        device.reboot()

    end = aggregator.run(kill)
    assert len(end.survivors) == 4
    np.testing.assert_allclose(aggregator.mean()[0], expected_mean(devices), atol=1e-3)
    assert all(len(device.disk.ledger) == 1 for device in devices)


def test_duplicates_and_reordering_change_nothing() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    seen: dict[str, list[object]] = {device.device_id: [] for device in devices}

    def repeat(device: FakeDevice) -> None:
        request = server.request(aggregator.state, device.device_id)
        message = request or invitation(aggregator.plan)
        for old in [message, *reversed(seen[device.device_id]), message]:
            device.receive(old)  # type: ignore[arg-type]
        seen[device.device_id].append(message)
        device.work()
        for old in reversed(seen[device.device_id]):
            device.receive(old)  # type: ignore[arg-type]

    aggregator.run(repeat)
    np.testing.assert_allclose(aggregator.mean()[0], expected_mean(devices), atol=1e-3)


def test_messages_that_come_too_early_are_ignored() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.ask()
    late = devices[0]
    roster = server.request(aggregator.state, late.device_id)
    for device in devices:
        device.work()
    aggregator.collect()
    aggregator.close()
    fresh = FakeDevice("device-0")
    fresh.install()
    fresh.disk.rounds = dict(late.disk.rounds)
    assert late.phase() == "SharesSent"
    delivery = server.request(aggregator.state, late.device_id)
    assert isinstance(roster, Roster)
    late.reboot()
    late.receive(delivery)  # type: ignore[arg-type]
    assert late.phase() == "Masking"


def test_a_dropout_does_not_stop_the_others() -> None:
    devices = fleet(5)
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.step()
    aggregator.lost.add("device-2")  # after its shares were delivered
    aggregator.step()
    aggregator.step()
    aggregator.step()
    survivors = [device for device in devices if device.device_id != "device-2"]
    np.testing.assert_allclose(aggregator.mean()[0], expected_mean(survivors), atol=1e-3)


def test_training_starts_with_the_roster_and_not_before() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.ask()
    assert all(not device.jobs for device in devices)
    aggregator.collect()
    aggregator.close()
    aggregator.ask()
    for device in devices:
        assert [type(job) for job in device.jobs] == [Train]
        assert [type(message) for message in device.take()] == [ShareKeys]


def test_training_waits_for_the_base_version() -> None:
    devices = fleet()
    second = manifest(2)
    late = devices[0]
    for device in devices[1:]:
        device.install(second)
        device.take()
    late.receive(announcement(second))  # announced, and its files are not here yet
    needs = [message for message in late.take() if isinstance(message, BlobNeed)]
    aggregator = Aggregator(devices, plan(base=second))
    aggregator.step()
    aggregator.ask()
    assert late.phase() == "SharesSent" and not late.jobs
    late.outbox.extend(needs)
    serve(late, {second.weights.sha256: weights(2)})
    late.work()
    aggregator.collect()
    for device in devices:
        device.work()
    aggregator.collect()
    aggregator.close()
    for _ in range(3):
        aggregator.step()
    assert aggregator.mean()[0].shape == (SIZE,)


def test_an_unknown_base_version_is_waited_for_in_silence() -> None:
    device = FakeDevice()
    device.receive(invitation(plan()))
    assert device.take() == [] and "waiting-for-version" in device.note_events()
    device.install()
    device.take()
    device.receive(invitation(plan()))
    assert [type(message) for message in device.take()] == [AdvertiseKeys]


def test_the_same_invitation_gets_the_same_keys_also_after_a_kill() -> None:
    device = fleet(1)[0]
    device.receive(invitation(plan()))
    (first,) = device.take()
    device.receive(invitation(plan()))
    device.reboot()
    device.receive(invitation(plan()))
    assert {message.model_dump_json() for message in device.take()} == {first.model_dump_json()}


def test_a_round_id_is_never_used_twice() -> None:
    device = fleet(1)[0]
    device.receive(invitation(plan()))
    device.receive(RoundEnd(round_id="a" * 32, completed=False, reason="too few"))
    device.take()
    device.reboot()
    device.take()
    device.receive(invitation(plan()))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == "round-reused"


def test_a_busy_device_says_so_and_repeats_its_last_answer() -> None:
    device = fleet(1)[0]
    device.receive(invitation(plan()))
    (keys,) = device.take()
    device.receive(invitation(plan("b" * 32)))
    refusal, again = device.take()
    assert isinstance(refusal, Refusal) and (refusal.code, refusal.round_id) == ("busy", "b" * 32)
    assert again == keys


def test_a_plan_from_a_later_version_shows_that_the_round_is_over() -> None:
    device = fleet(1)[0]
    device.receive(invitation(plan()))
    device.install(manifest(2))
    device.take()
    device.receive(invitation(plan("b" * 32, base=manifest(2))))
    assert [type(message) for message in device.take()] == [AdvertiseKeys]
    assert device.disk.closed == {"a" * 32: "superseded"}
    device.reboot()
    assert device.state.active is not None and device.state.active.round_id == "b" * 32


def test_a_second_plan_under_one_round_id_is_an_attack() -> None:
    device = fleet(1)[0]
    device.receive(invitation(plan()))
    device.take()
    device.receive(invitation(plan(issued_at=NOW - 5)))
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort) and abort.code == "plan-changed"
    assert device.state.active is None


def to_input_sent(device_count: int = 4) -> tuple[Aggregator, FakeDevice]:
    devices = fleet(device_count)
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.step()
    aggregator.ask()
    device = devices[0]
    device.work()
    assert device.phase() == "InputSent"
    return aggregator, device


def test_an_upload_is_offered_until_its_receipt_comes() -> None:
    _, device = to_input_sent()
    (offer,) = [message for message in device.take() if isinstance(message, UploadOffer)]
    times = []
    for _ in range(400):
        device.tick(0.25)
        if device.take() == [offer]:
            times.append(device.steady)
    gaps = np.diff(times)
    assert gaps[0] <= 2.0 and gaps[-1] <= 15.5 and list(gaps) == sorted(gaps)
    device.receive(UploadReceipt(round_id=offer.round_id, blob=offer.blob, accepted=True))
    device.tick(60.0)
    assert device.take() == []
    device.reboot()
    device.tick(60.0)
    assert device.take() == []


def test_after_a_kill_the_same_masked_input_is_offered() -> None:
    aggregator, device = to_input_sent()
    data = dict(device.disk.uploads)
    device.reboot()
    assert not device.jobs, "a committed input is never made again"
    (offer,) = [message for message in device.take() if isinstance(message, UploadOffer)]
    assert device.disk.uploads == data and describe(data["a" * 32]) == offer.blob
    aggregator.pull(device, offer)


def test_a_kill_between_writing_and_committing_makes_a_new_input_that_nobody_saw() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.step()
    aggregator.ask()
    device = devices[0]
    assert [type(job) for job in device.jobs] == [MaskInput]
    device.disk.uploads["a" * 32] = b"half of a blob that was never committed"
    device.reboot()
    assert device.phase() == "Masking"
    assert [type(job) for job in device.jobs] == [Train]
    for other in devices:
        other.work()
    aggregator.collect()
    aggregator.close()
    aggregator.step()
    aggregator.step()
    np.testing.assert_allclose(aggregator.mean()[0], expected_mean(devices), atol=1e-3)


def test_a_refused_upload_ends_the_round() -> None:
    _, device = to_input_sent()
    (offer,) = [message for message in device.take() if isinstance(message, UploadOffer)]
    device.receive(UploadReceipt(round_id=offer.round_id, blob=offer.blob, accepted=False, code="late"))
    assert device.state.active is None and device.disk.closed["a" * 32] == "upload refused: late"


def test_chunks_of_anything_else_are_not_served() -> None:
    _, device = to_input_sent()
    device.receive(BlobNeed(blob=describe(b"another"), indices=(0,)))
    assert device.chunks == []


def test_an_expired_plan_erases_everything() -> None:
    _, device = to_input_sent()
    device.unix = NOW + 3600
    device.tick()
    assert device.state.active is None and device.disk.uploads == {}
    assert device.disk.closed["a" * 32] == "the plan expired"


def test_answers_are_stored_before_they_are_sent_and_never_differ() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    for _ in range(3):
        aggregator.step()
    answers: dict[str, set[str]] = {}
    for kind in (ConsistencySignature, UnmaskingShares):
        for device in devices:
            request = server.request(aggregator.state, device.device_id)
            assert request is not None
            for _ in range(3):
                device.receive(request)
                device.reboot()
                answers.setdefault(device.device_id, set()).update(
                    message.model_dump_json() for message in device.outbox if isinstance(message, kind)
                )
            device.work()
        assert all(len(found) == 1 for found in answers.values())
        answers.clear()
        aggregator.collect()
        aggregator.close()
    assert aggregator.mean()[1]["examples"] == pytest.approx(7, abs=0.01)


@pytest.mark.parametrize("step", range(5))
def test_a_reconnect_repeats_the_last_answer(step: int) -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    for _ in range(step):
        aggregator.step()
    aggregator.ask()
    device = devices[0]
    device.work()
    said = [message for message in device.take() if not isinstance(message, BlobNeed)]
    device.give(Connected())
    assert [message for message in device.take() if not isinstance(message, BlobNeed)] == said


def test_a_failed_training_aborts_with_its_code_and_the_device_survives() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    aggregator.ask()
    device = devices[0]
    device.take()
    device.give(WorkFailed("a" * 32, Fault("non-finite-update", "the loss became nan")))
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort) and abort.code == "non-finite-update"
    assert device.state.active is None and device.disk.ledger == []
    late = TrainingFinished("a" * 32, LocalUpdate(device.delta, 1, 1.0, 1.0, 0.0))
    device.give(late)
    assert device.take() == []
    device.receive(invitation(plan("b" * 32)))
    assert [type(message) for message in device.take()] == [AdvertiseKeys]


def test_a_request_of_a_round_that_was_left_is_answered_by_an_abort() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    device = devices[0]
    device.receive(RoundEnd(round_id="a" * 32, completed=False))
    aggregator.ask()
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort) and abort.code == "not-in-round"


def test_a_forged_roster_aborts_the_round_and_erases_its_secrets() -> None:
    devices = fleet()
    aggregator = Aggregator(devices, plan())
    aggregator.step()
    device = devices[0]
    roster = server.request(aggregator.state, device.device_id)
    assert isinstance(roster, Roster)
    forged = roster.entries[1].model_copy(update={"mask_key": bytes(32)})
    device.receive(roster.model_copy(update={"entries": (roster.entries[0], forged, *roster.entries[2:])}))
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort)
    assert device.state.active is None and device.disk.memory().active is None


def test_a_roster_across_sub_cohorts_of_the_plan_ends_the_round() -> None:
    devices = fleet()
    halves = plan(cohort=CohortParameters(size=8, minimum=3, minimum_survivors=2, subcohort_limit=4))
    aggregator = Aggregator(devices, halves)
    names = [device.device_id for device in devices]
    assert all(halves.cohort.split.parts(names, aggregator.document.digest))
    aggregator.step()
    device = devices[0]
    roster = server.request(aggregator.state, device.device_id)
    assert isinstance(roster, Roster)
    device.receive(roster)
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort)
    assert abort.code == "wrong-subcohort"
    assert device.state.active is None


def test_a_base_version_that_turns_out_bad_ends_the_round() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    device.receive(invitation(plan()))
    assert device.phase() == "Advertised"
    others = fleet(4)[1:]
    aggregator = Aggregator([device, *others], plan())
    aggregator.ask()
    aggregator.collect()
    aggregator.close()
    device.give(Connected())  # asks for the chunks again
    roster = server.request(aggregator.state, device.device_id)
    device.receive(roster)  # type: ignore[arg-type]
    assert device.phase() == "SharesSent"
    model = manifest()
    serve(device, {model.graph.sha256: b"graph" * 30_000, model.weights.sha256: weights()})
    device.take()
    device.give(VersionTested(model.sha256(), Fault("model-unusable", "an unknown operator")))
    (abort,) = device.take()
    assert isinstance(abort, ClientAbort) and abort.code == "model-unusable"


def test_the_policy_history_survives_a_reboot() -> None:
    devices = fleet()
    strict = PERMISSIVE.model_copy(update={"maximum_rounds_per_day": 1})
    aggregator = Aggregator(devices, plan())
    aggregator.run()
    aggregator.end()
    device = devices[0]
    device.profile = type(device.profile)(**{**vars(device.profile), "policy": strict})
    device.reboot()
    device.take()
    device.receive(invitation(plan("b" * 32)))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == "too-many-rounds"


def test_the_reason_of_an_end_steers_no_terminal() -> None:
    device = fleet()[0]
    device.receive(invitation(plan()))
    device.receive(RoundEnd(round_id=plan().round_id, completed=False, reason="\x1b[2Jgone\nfor good"))
    assert device.disk.closed == {plan().round_id: "ended: [2Jgonefor good"}


def test_rounds_that_never_come_to_anything_end_too() -> None:
    """A signer who invites and ends without end would fill memory and disk with ids that are kept."""
    device = fleet()[0]
    strict = PERMISSIVE.model_copy(update={"maximum_rounds_per_day": 1})
    device.profile = type(device.profile)(**{**vars(device.profile), "policy": strict})
    names = [name * 32 for name in "bcdef0"]

    def invite(name: str) -> FromDevice:
        device.take()
        now = device.unix
        device.receive(invitation(plan(name, issued_at=now, expires_at=now + 600)))
        (answer,) = device.take()
        device.receive(RoundEnd(round_id=name, completed=False))
        return answer

    assert all(isinstance(invite(name), AdvertiseKeys) for name in names[:4])
    for _ in range(2):
        refusal = invite(names[4])
        assert isinstance(refusal, Refusal) and refusal.code == "too-many-rounds"
        device.reboot()
    device.unix += 86_401
    assert isinstance(invite(names[5]), AdvertiseKeys)


def stale_plan(maximum: int) -> Plan:
    """A round from version 3, for devices that are up to `maximum` versions behind."""
    training = TrainingParameters(local_epochs=1, learning_rate=0.1, maximum_staleness=maximum)
    return plan(base=manifest(3), training=training)


def test_devices_that_are_behind_train_from_what_they_have_and_weigh_less() -> None:
    devices = fleet(4)
    for device, version in zip(devices, (3, 3, 2, 1), strict=True):
        if version > 1:
            device.install(manifest(version))
    asked = stale_plan(2)
    aggregator = Aggregator(devices, asked)
    bases: dict[str, int] = {}

    def look(device: FakeDevice) -> None:
        for job in device.jobs:
            if isinstance(job, Train):
                bases[device.device_id] = job.manifest.version
        # After a reboot, a device still knows which version it began from.
        if device.device_id in ("device-0", "device-3") and device.phase() == "Masking":
            device.reboot()

    aggregator.run(look)
    assert bases == {"device-0": 3, "device-1": 3, "device-2": 2, "device-3": 1}
    expected = np.zeros(SIZE)
    for device, staleness in zip(devices, (0, 0, 1, 2), strict=True):
        norm = np.linalg.norm(device.delta.astype(np.float64))
        clipped = device.delta * min(1.0, asked.privacy.clip_norm / norm)
        expected += clipped / np.sqrt(1 + staleness) / len(devices)
    np.testing.assert_allclose(aggregator.mean()[0], expected, atol=2e-3)


def test_a_device_that_is_too_far_behind_waits_for_the_version() -> None:
    for installed, maximum in ((1, 1), (2, 0)):
        device = FakeDevice()
        device.install(manifest(installed))
        device.take()
        device.receive(invitation(stale_plan(maximum)))
        assert device.take() == [] and device.state.active is None
    device = FakeDevice()
    device.install(manifest(4))  # ahead: it cannot go back
    device.take()
    device.receive(invitation(stale_plan(2)))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == "stale-version"


def test_a_clip_norm_does_not_adapt_to_updates_of_unequal_weight() -> None:
    asked = stale_plan(1)
    privacy = asked.privacy.model_copy(update={"adaptive": AdaptiveClipping()})
    with pytest.raises(MalformedMessage, match="allow no staleness"):
        Plan.from_bytes(asked.model_copy(update={"privacy": privacy}).to_bytes())
