"""The aggregator's machine: wrong answers change nothing, liars are named, and an abort says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol.columns import SealedColumn, ShareColumn
from protocol.errors import BadSignature, IllegalEvent, MalformedMessage
from protocol.identity import sign
from protocol.messages import (
    AdvertiseKeys,
    ClientAbort,
    ConsistencySignature,
    Refusal,
    ShareKeys,
    UnmaskingShares,
)
from protocol.secagg import client, server
from protocol.secagg import roster as rosters
from protocol.secagg.server_state import Checking, Collecting, Failed, Recovered, Sharing, Unmasking
from tests.secagg_round import (
    FLEET,
    NOW,
    PLAN_HASH,
    ROUND_ID,
    Cohort,
    certificate,
    client_context,
    entropy,
    identity,
)


def collecting(size: int = 5) -> Cohort:
    cohort = Cohort(size)
    cohort.advertise()
    cohort.exchange()
    assert isinstance(cohort.server, Collecting)
    return cohort


def unmasking(size: int = 5, drop: frozenset[str] = frozenset()) -> Cohort:
    cohort = collecting(size)
    cohort.deliver()
    cohort.upload(drop=drop)
    cohort.exchange()
    assert isinstance(cohort.server, Unmasking)
    return cohort


def unchanged(cohort: Cohort, device: str, message: server.ClientMessage, error: type[Exception]) -> None:
    before = cohort.server
    with pytest.raises(error):
        cohort.receive(device, message)
    assert cohort.server is before


def test_check_in_of_a_stranger_or_under_a_wrong_name_is_refused() -> None:
    cohort = Cohort(3)
    own = cohort.clients["device-001"].answer
    assert isinstance(own, AdvertiseKeys)
    unchanged(cohort, "device-077", own, IllegalEvent)
    unchanged(cohort, "device-000", own, BadSignature)
    unchanged(cohort, "device-001", own.model_copy(update={"mask_key": entropy("k")}), BadSignature)
    unchanged(cohort, "device-001", own.model_copy(update={"round_id": "e" * 32}), IllegalEvent)


def test_a_second_check_in_with_other_keys_does_not_replace_the_first() -> None:
    cohort = Cohort(3)
    first = cohort.clients["device-001"].answer
    cohort.receive("device-001", first)  # type: ignore[arg-type]
    other = client.begin(
        client_context("device-001"), certificate("device-001"), identity("device-001"), entropy("second")
    ).answer
    before = cohort.server
    cohort.receive("device-001", other)
    assert cohort.server is before


@pytest.mark.parametrize("key", ["encryption_key", "mask_key"])
def test_a_key_that_agrees_with_nobody_does_not_stop_a_round_of_honest_clients(key: str) -> None:
    """A point of low order, properly signed: every neighbour would have to leave the round."""
    cohort = Cohort(6)
    honest = cohort.clients["device-003"].answer
    assert isinstance(honest, AdvertiseKeys)
    keys = {"encryption_key": honest.encryption_key, "mask_key": honest.mask_key, key: bytes(32)}
    payload = rosters.advertisement_payload(FLEET, ROUND_ID, PLAN_HASH, **keys)
    signature = sign(identity("device-003"), rosters.ADVERTISE_KIND, payload)
    with pytest.raises(BadSignature, match="low order"):
        cohort.receive("device-003", honest.model_copy(update={**keys, "signature": signature}))
    recovered = cohort.run({"advertise": {"device-003"}})
    assert isinstance(recovered, Recovered) and len(recovered.survivors) == 5


def test_too_few_check_ins_fail_with_the_figures() -> None:
    cohort = Cohort(3)
    cohort.drop("device-000", "device-001")
    cohort.advertise()
    assert isinstance(cohort.server, Failed)
    assert (cohort.server.code, cohort.server.detail) == (
        "too-few-check-ins",
        "1 devices checked in, 2 needed",
    )


def test_a_refusal_ends_the_wait_for_that_device() -> None:
    cohort = Cohort(4)
    cohort.receive("device-002", Refusal(round_id=ROUND_ID, code="minimum-cohort"))
    assert "device-002" not in server.awaited(cohort.server)
    late = cohort.clients["device-002"].answer
    unchanged(cohort, "device-002", late, IllegalEvent)  # type: ignore[arg-type]


def test_shares_for_others_than_the_neighbours_are_refused() -> None:
    cohort = Cohort(4)
    cohort.advertise()
    assert isinstance(cohort.server, Sharing)
    device = "device-001"
    answer = cohort.give(device, cohort.event_for(device))
    assert isinstance(answer, ShareKeys)
    unchanged(cohort, device, answer.model_copy(update={"roster_hash": entropy("r")}), MalformedMessage)
    shares = answer.shares.by_peer()
    first = shares.pop(0)
    for wrong in (shares, {**shares, 1: first}, {**shares, 7: first}, {}, {0: first, **shares, 4: first}):
        other = answer.model_copy(update={"shares": SealedColumn.of(wrong)})
        unchanged(cohort, device, other, MalformedMessage)


def test_a_masked_input_counts_once_and_only_from_a_sharer() -> None:
    cohort = Cohort(5)
    cohort.advertise()
    cohort.drop("device-004")
    cohort.exchange()
    assert isinstance(cohort.server, Collecting)
    once = server.handle(cohort.server, server.InputStored("device-001"))
    assert isinstance(once, Collecting)
    twice = server.handle(once, server.InputStored("device-001"))
    assert isinstance(twice, Collecting)
    assert twice.survivors == once.survivors == {1}
    with pytest.raises(IllegalEvent):
        server.handle(cohort.server, server.InputStored("device-004"))


def test_an_input_in_another_phase_is_refused() -> None:
    cohort = unmasking()
    with pytest.raises(IllegalEvent):
        server.handle(cohort.server, server.InputStored("device-001"))


def test_signatures_on_another_set_or_by_another_are_refused() -> None:
    cohort = collecting()
    cohort.deliver()
    cohort.upload(drop=frozenset({"device-004"}))
    assert isinstance(cohort.server, Checking)
    answer = cohort.give("device-001", cohort.event_for("device-001"))
    assert isinstance(answer, ConsistencySignature)
    unchanged(cohort, "device-002", answer, BadSignature)
    unchanged(cohort, "device-004", answer, IllegalEvent)
    unchanged(
        cohort, "device-001", answer.model_copy(update={"survivors_hash": entropy("s")}), MalformedMessage
    )


def lying(answer: UnmaskingShares, lie: Callable[[int], bytes], about: set[int]) -> UnmaskingShares:
    """The same answer with other shares of the secrets of some."""
    shares = answer.shares.by_peer()
    forged = {owner: lie(owner) for owner in shares.keys() & about}
    return answer.model_copy(update={"shares": ShareColumn.of({**shares, **forged})})


def test_a_client_that_sends_wrong_shares_is_named_and_the_sum_is_right() -> None:
    cohort = unmasking(size=7, drop=frozenset({"device-006"}))
    liar = "device-002"
    for device in sorted(cohort.alive):
        answer = cohort.give(device, cohort.event_for(device))
        assert isinstance(answer, UnmaskingShares)
        if device == liar:
            answer = lying(answer, lambda owner: b"\x00" + entropy(owner), set(range(6)))
        cohort.receive(device, answer)
    cohort.close()
    end = cohort.server
    assert isinstance(end, Recovered)
    assert end.misbehaved == {2}
    assert (cohort.unmasked(end) == cohort.sum_of(cohort.names(end.survivors))).all()


@pytest.mark.parametrize("kind", ["stranger", "beyond the roster", "another set"])
def test_malformed_unmasking_answers_are_refused(kind: str) -> None:
    cohort = unmasking(drop=frozenset({"device-004"}))
    device = "device-001"
    answer = cohort.give(device, cohort.event_for(device))
    assert isinstance(answer, UnmaskingShares)
    shares = answer.shares.by_peer()
    changes: dict[str, dict[str, object]] = {
        "stranger": {"shares": ShareColumn.of({**shares, 40: bytes(33)})},
        "beyond the roster": {"shares": ShareColumn.of({**shares, 2**16 - 1: bytes(33)})},
        "another set": {"survivors_hash": entropy("s")},
    }
    unchanged(cohort, device, answer.model_copy(update=changes[kind]), MalformedMessage)


def test_too_few_answers_fail_and_name_the_secret_that_is_missing() -> None:
    cohort = unmasking()
    cohort.drop("device-000", "device-001")
    cohort.exchange()
    assert isinstance(cohort.server, Failed)
    assert cohort.server.code == "unmasking-failed"
    assert "threshold 4" in cohort.server.detail and cohort.server.detail.startswith("device-")


def test_an_aborting_survivor_is_not_waited_for_and_the_round_completes() -> None:
    cohort = unmasking(size=7)
    cohort.receive("device-003", ClientAbort(round_id=ROUND_ID, code="test"))
    assert "device-003" not in server.awaited(cohort.server)
    cohort.drop("device-003")
    cohort.exchange()
    assert isinstance(cohort.server, Recovered)


def test_after_the_end_nothing_is_accepted_or_asked() -> None:
    cohort = Cohort(4)
    end = cohort.run()
    assert isinstance(end, Recovered)
    assert server.request(end, "device-000") is None
    assert not server.awaited(end)
    unchanged(cohort, "device-000", ClientAbort(round_id=ROUND_ID, code="late"), IllegalEvent)
    with pytest.raises(IllegalEvent):
        server.handle(end, server.ClosePhase())
    assert NOW > 0


# --- who is to blame


def answered(cohort: Cohort, lies: dict[str, set[int]]) -> None:
    """Everyone answers; some lie about the secrets of others."""
    for device in sorted(cohort.alive):
        answer = cohort.give(device, cohort.event_for(device))
        assert isinstance(answer, UnmaskingShares)
        about = lies.get(device, set())
        cohort.receive(
            device,
            lying(answer, lambda owner, device=device: b"\x00" + entropy(device, owner), about),  # type: ignore[misc]
        )
    cohort.close()


def test_a_client_that_contradicts_more_than_may_be_corrupt_lied() -> None:
    cohort = unmasking(size=10)
    answered(cohort, {"device-002": {0, 1, 3, 4}})
    assert isinstance(cohort.server, Recovered)
    assert cohort.server.liars == {"device-002"}


def test_clients_that_may_be_corrupt_frame_nobody() -> None:
    """Three of ten dealt the same holder wrong shares: it is named, and neither it nor they are excluded."""
    cohort = unmasking(size=10)
    answered(cohort, {"device-002": {0, 1, 3}})
    assert isinstance(cohort.server, Recovered)
    assert cohort.server.misbehaved == {2}
    assert cohort.server.liars == set()


def test_a_client_that_dealt_wrong_shares_to_many_lied() -> None:
    cohort = unmasking(size=13)
    # What holders get from it is garbage for four of them, which is what its wrong dealing looks like.
    answered(cohort, {f"device-{i:03d}": {0} for i in (1, 2, 3, 4)})
    assert isinstance(cohort.server, Recovered)
    assert cohort.server.liars == set()  # four of thirteen may be corrupt
    cohort = unmasking(size=13)
    answered(cohort, {f"device-{i:03d}": {0} for i in (1, 2, 3, 4, 5)})
    assert isinstance(cohort.server, Failed)
    assert cohort.server.liars == {"device-000"}
    assert cohort.server.detail.startswith("device-000: ")


def test_a_liar_blames_nobody_when_no_share_is_to_spare() -> None:
    """Just the threshold answers, and one of them lies: every secret is lost, and no owner is to blame."""
    cohort = unmasking(size=10)
    cohort.drop("device-007", "device-008", "device-009")
    answered(cohort, {"device-001": {0}})
    assert isinstance(cohort.server, Failed)
    assert cohort.server.liars == set()


def test_liars_that_spoil_every_secret_blame_no_owner() -> None:
    cohort = unmasking(size=10)
    everything = set(range(10))
    answered(cohort, {f"device-{i:03d}": everything for i in (6, 7, 8, 9)})
    assert isinstance(cohort.server, Failed)
    assert cohort.server.liars == set()


def test_wrong_key_shares_of_a_dropout_are_told_by_its_public_key() -> None:
    cohort = unmasking(size=7, drop=frozenset({"device-006"}))
    for device in sorted(cohort.alive):
        answer = cohort.give(device, cohort.event_for(device))
        assert isinstance(answer, UnmaskingShares)
        if device == "device-002":
            answer = lying(answer, lambda _: bytes(33), {6})
        cohort.receive(device, answer)
    cohort.close()
    assert isinstance(cohort.server, Recovered)
    assert cohort.server.misbehaved == {2}
    assert (cohort.unmasked(cohort.server) == cohort.sum_of(cohort.names(cohort.server.survivors))).all()


@pytest.mark.parametrize("phase", ["share", "check", "unmask"])
def test_an_answer_after_its_phase_changes_nothing(phase: str) -> None:
    """One client answers everything in time but one request, and that one after the others' phase is over."""
    cohort, late = Cohort(5), "device-004"
    answers: list[client.Answer] = []

    def exchange(current: str) -> None:
        if current == phase:
            answers.append(cohort.give(late, cohort.event_for(late)))
            cohort.drop(late)
        cohort.exchange()

    cohort.advertise()
    exchange("share")
    cohort.deliver()
    cohort.upload()
    exchange("check")
    exchange("unmask")
    assert isinstance(cohort.server, Recovered)
    (answer,) = answers
    assert answer is not None
    unchanged(cohort, late, answer, IllegalEvent)  # type: ignore[arg-type]
    assert (cohort.unmasked(cohort.server) == cohort.sum_of(cohort.names(cohort.server.survivors))).all()
    assert (late in cohort.names(cohort.server.survivors)) == (phase != "share")
