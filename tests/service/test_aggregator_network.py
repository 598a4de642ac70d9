"""A network that repeats, loses, reorders and forges: rounds lose nothing to it."""

from __future__ import annotations

import numpy as np

from aggregator.fleet.authority import Authority
from protocol import topics
from protocol.codec import encode
from protocol.messages import AdvertiseKeys, RoundEnd, UploadOffer
from protocol.plan import Deadlines
from protocol.transfer import describe
from tests.aggregator_bench import Bench
from tests.aggregator_devices import Outgoing
from tests.toy_rounds import REQUEST, check_completed, phase, request


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
