"""The client distrusts the aggregator: each lie is a test that a naive client would fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.columns import SealedColumn, SignatureColumn
from protocol.errors import IllegalEvent
from protocol.messages import (
    ClientAbort,
    Roster,
    RosterEntry,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    UnmaskingShares,
    UnmaskRequest,
)
from protocol.secagg import client, server
from protocol.secagg import roster as rosters
from protocol.secagg.client_state import Aborted, Ended, Masking, SetSigned, Unmasked, dump_state
from protocol.secagg.parameters import GraphAssumptions
from protocol.secagg.server_state import Advertising, Checking, Sharing, Unmasking
from protocol.transfer import describe
from tests.secagg_round import (
    NOW,
    PLAN_HASH,
    ROUND_ID,
    Cohort,
    certificate,
    client_context,
    dealt,
    entropy,
    identity,
)

VICTIM = "device-000"


def roster_for(cohort: Cohort, device: str = VICTIM) -> Roster:
    request = server.request(cohort.server, device)
    assert isinstance(request, Roster)
    return request


def give_roster(cohort: Cohort, roster: Roster, device: str = VICTIM) -> client.Answer:
    return cohort.give(device, client.RosterReceived(roster, entropy("roster", device), NOW))


def code(answer: client.Answer) -> str:
    assert isinstance(answer, ClientAbort), answer
    return answer.code


def rebuilt(roster: Roster, entries: tuple[RosterEntry, ...], size: int | None = None) -> Roster:
    """A roster that is consistent in itself: the attacker recomputes the root."""
    root = rosters.merkle_tree([rosters.leaf_hash(entry) for entry in entries])[-1][0]
    return roster.model_copy(update={"entries": entries, "root": root, "size": size or len(entries)})


def advertised(size: int = 5) -> Cohort:
    cohort = Cohort(size)
    cohort.advertise()
    return cohort


def puppet_entry(roster: Roster, index: int, device: str, **changes: bytes) -> RosterEntry:
    """A check-in signed by `device`'s real identity for this round, with chosen keys."""
    state = client.begin(client_context(device), certificate(device), identity(device), entropy("p", device))
    fields = state.answer.model_dump(include={"certificate", "encryption_key", "mask_key", "signature"})
    return RosterEntry(index=index, **{**fields, **changes})


def test_a_forged_key_of_a_peer_is_refused() -> None:
    cohort = advertised()
    roster = roster_for(cohort)
    forged = roster.entries[2].model_copy(update={"mask_key": roster.entries[3].mask_key})
    entries = (*roster.entries[:2], forged, *roster.entries[3:])
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "bad-signature"


def test_keys_signed_for_another_plan_or_round_are_refused() -> None:
    for change in ({"plan_hash": entropy("other plan")}, {"round_id": "f" * 32}, {"fleet": "vineyard"}):
        cohort = advertised()
        roster = roster_for(cohort)
        other = client.begin(
            client_context("device-002", **change),
            certificate("device-002"),
            identity("device-002"),
            entropy("replay"),
        ).answer
        stale = RosterEntry(
            index=2,
            certificate=other.certificate,
            encryption_key=other.encryption_key,
            mask_key=other.mask_key,
            signature=other.signature,
        )
        entries = (*roster.entries[:2], stale, *roster.entries[3:])
        assert code(give_roster(cohort, rebuilt(roster, entries))) == "bad-signature"


def test_a_certificate_of_another_fleet_is_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol.identity import create_ca, issue_certificate

    key = Ed25519PrivateKey.from_private_bytes(entropy("rogue ca"))
    rogue = create_ca(key, "orchard", now=NOW, days=10, serial=5)
    public = identity("device-002").public_key()
    foreign = issue_certificate(key, rogue, "device-002", public, now=NOW, days=5, serial=6)
    cohort = advertised()
    roster = roster_for(cohort)
    entries = tuple(
        e.model_copy(update={"certificate": foreign}) if e.index == 2 else e for e in roster.entries
    )
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "bad-signature"


def test_a_cohort_shrunk_to_the_victim_and_puppets_is_refused() -> None:
    cohort = advertised()
    state = cohort.clients[VICTIM]
    cohort.clients[VICTIM] = replace(state, context=client_context(VICTIM, minimum_cohort=5))  # type: ignore[arg-type]
    roster = roster_for(cohort)
    assert code(give_roster(cohort, rebuilt(roster, roster.entries[:2]))) == "cohort-size"


def test_a_cohort_beyond_the_ring_is_refused() -> None:
    cohort = advertised()
    state = cohort.clients[VICTIM]
    cohort.clients[VICTIM] = replace(state, context=client_context(VICTIM, maximum_cohort=4))  # type: ignore[arg-type]
    assert code(give_roster(cohort, roster_for(cohort))) == "cohort-size"


def test_one_device_in_two_places_is_refused() -> None:
    cohort = advertised()
    roster = roster_for(cohort)
    twin = puppet_entry(roster, 3, "device-002")
    entries = (*roster.entries[:3], twin, *roster.entries[4:])
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "repeated-device"


def test_a_roster_out_of_order_is_refused() -> None:
    """On a regular graph a client sees a few places only: by the order it can tell one device in many."""
    cohort = advertised()
    roster = roster_for(cohort)
    *first, fourth, fifth = roster.entries
    entries = (*first, fifth.model_copy(update={"index": 3}), fourth.model_copy(update={"index": 4}))
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "roster-order"


def test_the_victim_itself_cannot_be_its_own_peer() -> None:
    """A second check-in under the victim's identity would make it share its secrets with itself."""
    cohort = advertised()
    roster = roster_for(cohort)
    other = client.begin(
        client_context(VICTIM), certificate(VICTIM), identity(VICTIM), entropy("second")
    ).answer
    twin = RosterEntry(
        index=3,
        certificate=other.certificate,
        encryption_key=other.encryption_key,
        mask_key=other.mask_key,
        signature=other.signature,
    )
    entries = (*roster.entries[:3], twin, *roster.entries[4:])
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "repeated-device"


def test_a_roster_without_the_victim_is_refused() -> None:
    cohort = advertised()
    roster = roster_for(cohort)
    entries = tuple(e.model_copy(update={"index": i}) for i, e in enumerate(roster.entries[1:]))
    assert code(give_roster(cohort, rebuilt(roster, entries))) == "not-in-roster"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.model_copy(update={"root": entropy("root")}), "roster-root"),
        (lambda r: r.model_copy(update={"entries": r.entries[:-1]}), "wrong-graph"),
        (lambda r: r.model_copy(update={"entries": (*r.entries, r.entries[1])}), "roster-indices"),
        (lambda r: r.model_copy(update={"size": len(r.entries) - 1}), "roster-indices"),
        (lambda r: r.model_copy(update={"entries": ()}), "roster-indices"),
    ],
    ids=["root", "missing entry", "repeated entry", "size below entries", "empty"],
)
def test_a_roster_that_contradicts_itself_is_refused(
    change: Callable[[Roster], Roster], expected: str
) -> None:
    cohort = advertised()
    assert code(give_roster(cohort, change(roster_for(cohort)))) == expected


def test_an_expired_certificate_is_refused() -> None:
    cohort = advertised()
    event = client.RosterReceived(roster_for(cohort), entropy("r"), NOW + 366 * 86_400)
    assert code(cohort.give(VICTIM, event)) == "bad-signature"


def test_a_second_roster_is_refused_and_the_same_one_gets_the_same_shares() -> None:
    cohort = advertised()
    roster = roster_for(cohort)
    first = give_roster(cohort, roster)
    again = cohort.give(VICTIM, client.RosterReceived(roster, entropy("fresh entropy"), NOW))
    assert isinstance(first, ShareKeys)
    assert again == first
    smaller = rebuilt(roster, roster.entries[:4])
    assert code(give_roster(cohort, smaller)) == "split-view"
    assert isinstance(cohort.clients[VICTIM], Aborted)


# --- shares ----------------------------------------------------------------------------------------------


def delivered() -> Cohort:
    cohort = advertised()
    cohort.exchange()
    return cohort


def with_shares(delivery: ShareDelivery, shares: dict[int, bytes]) -> ShareDelivery:
    return delivery.model_copy(update={"shares": SealedColumn.of(shares)})


def delivery_for(cohort: Cohort, device: str = VICTIM) -> ShareDelivery:
    request = server.request(cohort.server, device)
    assert isinstance(request, ShareDelivery)
    return request


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.model_copy(update={"roster_hash": entropy("x")}), "split-view"),
        (lambda d: with_shares(d, {**d.shares.by_peer(), 9: bytes(82)}), "unknown-peer"),
        (lambda d: with_shares(d, {**d.shares.by_peer(), 0: bytes(82)}), "unknown-peer"),
        (lambda d: with_shares(d, {1: bytes(82)}), "too-few-shares"),
    ],
    ids=["another roster", "stranger", "itself", "below threshold"],
)
def test_a_wrong_delivery_of_shares_is_refused(
    change: Callable[[ShareDelivery], ShareDelivery], expected: str
) -> None:
    cohort = delivered()
    assert code(cohort.give(VICTIM, client.SharesReceived(change(delivery_for(cohort))))) == expected


def test_a_second_delivery_with_fewer_peers_is_refused() -> None:
    """Masks with one peer fewer would show the difference of two masked inputs."""
    cohort = delivered()
    delivery = delivery_for(cohort)
    cohort.give(VICTIM, client.SharesReceived(delivery))
    assert cohort.give(VICTIM, client.SharesReceived(delivery)) is None
    others = delivery.shares.by_peer()
    del others[1]
    assert code(cohort.give(VICTIM, client.SharesReceived(with_shares(delivery, others)))) == "split-view"


# --- survivor set and unmasking --------------------------------------------------------------------------


def checked(drop: frozenset[str] = frozenset({"device-004"})) -> Cohort:
    cohort = delivered()
    cohort.deliver()
    cohort.upload(drop=drop)
    assert isinstance(cohort.server, Checking)
    return cohort


def survivor_set(members: set[int], size: int = 5) -> SurvivorSet:
    return SurvivorSet(round_id=ROUND_ID, survivors=rosters.members_to_bytes(members, size))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({1, 2, 3, 4}, "listed-dropped"),
        ({0, 1, 2}, "too-few-survivors"),
        ({0}, "too-few-survivors"),
    ],
)
def test_a_survivor_set_that_harms_the_victim_is_refused(members: set[int], expected: str) -> None:
    cohort = checked()
    event = client.SurvivorsReceived(survivor_set(members), identity(VICTIM))
    assert code(cohort.give(VICTIM, event)) == expected


def test_a_survivor_who_shared_no_keys_is_refused() -> None:
    cohort = advertised()
    cohort.drop("device-003")
    cohort.exchange()
    cohort.deliver()
    cohort.upload()
    event = client.SurvivorsReceived(survivor_set({0, 1, 2, 3, 4}), identity(VICTIM))
    assert code(cohort.give(VICTIM, event)) == "unknown-survivor"


@pytest.mark.parametrize("survivors", [b"", b"\x1f\x00", b"\x3f"], ids=["short", "long", "beyond the roster"])
def test_a_malformed_survivor_set_is_refused(survivors: bytes) -> None:
    cohort = checked()
    event = client.SurvivorsReceived(SurvivorSet(round_id=ROUND_ID, survivors=survivors), identity(VICTIM))
    assert code(cohort.give(VICTIM, event)) == "malformed"


def test_a_second_survivor_set_is_refused() -> None:
    """Different survivor sets to one client would get it to give both shares of a peer, one at a time."""
    cohort = checked()
    first = cohort.give(VICTIM, client.SurvivorsReceived(survivor_set({0, 1, 2, 3}), identity(VICTIM)))
    again = cohort.give(VICTIM, client.SurvivorsReceived(survivor_set({0, 1, 2, 3}), identity(VICTIM)))
    assert again == first
    second = client.SurvivorsReceived(survivor_set({0, 1, 2, 3, 4}), identity(VICTIM))
    assert code(cohort.give(VICTIM, second)) == "split-view"


def test_different_survivor_sets_to_different_clients_get_no_shares() -> None:
    """The split view: no set gathers a quorum, so nobody unmasks."""
    cohort = checked(drop=frozenset())
    sets = {0: {0, 1, 2, 3, 4}, 1: {0, 1, 2, 3, 4}, 2: {0, 1, 2, 3}, 3: {0, 1, 2, 3}, 4: {0, 1, 2, 3, 4}}
    signatures: dict[int, bytes] = {}
    for index, members in sets.items():
        device = f"device-{index:03d}"
        answer = cohort.give(device, client.SurvivorsReceived(survivor_set(members), identity(device)))
        signatures[index] = answer.signature  # type: ignore[union-attr]
    for index in sets:
        device = f"device-{index:03d}"
        state = cohort.clients[device]
        assert isinstance(state, SetSigned)
        request = UnmaskRequest(
            round_id=ROUND_ID,
            survivors_hash=state.answer.survivors_hash,
            signatures=SignatureColumn.of({i: s for i, s in signatures.items() if i in sets[index]}),
        )
        answer = cohort.give(device, client.UnmaskRequested(request))
        assert code(answer) == "bad-signature"


def unmasking() -> Cohort:
    cohort = checked()
    cohort.exchange()
    assert isinstance(cohort.server, Unmasking)
    return cohort


def signed_by(request: UnmaskRequest, signatures: dict[int, bytes]) -> UnmaskRequest:
    return request.model_copy(update={"signatures": SignatureColumn.of(signatures)})


def moved(values: dict[int, bytes]) -> dict[int, bytes]:
    """Every client has the value of the next one."""
    return dict(zip(values, [*list(values.values())[1:], next(iter(values.values()))], strict=True))


def request_for(cohort: Cohort, device: str = VICTIM) -> UnmaskRequest:
    request = server.request(cohort.server, device)
    assert isinstance(request, UnmaskRequest)
    return request


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.model_copy(update={"survivors_hash": entropy("x")}), "split-view"),
        (lambda r: signed_by(r, dict(list(r.signatures.by_peer().items())[:2])), "no-quorum"),
        (lambda r: signed_by(r, {**r.signatures.by_peer(), 4: bytes(64)}), "unknown-signer"),
        (lambda r: signed_by(r, {**r.signatures.by_peer(), 400: bytes(64)}), "unknown-signer"),
        (lambda r: signed_by(r, dict.fromkeys(r.signatures.indices(), bytes(64))), "bad-signature"),
        (lambda r: signed_by(r, moved(r.signatures.by_peer())), "bad-signature"),
    ],
    ids=["another set", "no quorum", "dropped signer", "stranger", "forged", "of one another"],
)
def test_an_unmasking_without_a_quorum_is_refused(
    change: Callable[[UnmaskRequest], UnmaskRequest], expected: str
) -> None:
    cohort = unmasking()
    assert code(cohort.give(VICTIM, client.UnmaskRequested(change(request_for(cohort))))) == expected


def test_never_both_shares_of_one_peer() -> None:
    cohort = unmasking()
    answer = cohort.give(VICTIM, client.UnmaskRequested(request_for(cohort)))
    assert isinstance(answer, UnmaskingShares)
    given = answer.shares.by_peer()
    # Of a survivor the share of its seed, of the dropout the share of its key: the values themselves say it.
    assert given == {owner: dealt(f"device-{owner:03d}", 0, 5)[owner == 4] for owner in range(5)}


def test_asked_twice_it_answers_the_same_and_to_another_set_not_at_all() -> None:
    cohort = unmasking()
    request = request_for(cohort)
    first = cohort.give(VICTIM, client.UnmaskRequested(request))
    assert cohort.give(VICTIM, client.UnmaskRequested(request)) == first
    other = request.model_copy(update={"survivors_hash": entropy("other")})
    assert code(cohort.give(VICTIM, client.UnmaskRequested(other))) == "split-view"


def test_a_peer_that_sealed_garbage_does_not_stop_the_round() -> None:
    cohort = advertised()
    liar = "device-003"
    for device in sorted(cohort.alive):
        answer = cohort.give(device, cohort.event_for(device))
        assert isinstance(answer, ShareKeys)
        if device == liar:
            shares = SealedColumn.of({**answer.shares.by_peer(), 0: bytes(82)})
            answer = answer.model_copy(update={"shares": shares})
        cohort.receive(device, answer)
    cohort.close()
    cohort.deliver()
    cohort.upload()
    cohort.exchange()
    cohort.exchange()
    end = cohort.server
    assert end.__class__.__name__ == "Recovered"
    assert (cohort.unmasked(end) == cohort.sum_of(set(cohort.inputs))).all()  # type: ignore[arg-type]


# --- secrets ---------------------------------------------------------------------------------------------


def test_each_phase_forgets_what_it_no_longer_needs() -> None:
    cohort = delivered()
    cohort.deliver()
    state = cohort.clients[VICTIM]
    assert isinstance(state, Masking)
    mask_private, seed = state.mask_private, state.secrets.seed
    cohort.upload()

    def stored(secret: bytes) -> bool:
        import base64

        return base64.urlsafe_b64encode(secret) in dump_state(cohort.clients[VICTIM])[1]

    assert not stored(mask_private)
    assert stored(seed)
    cohort.exchange()
    cohort.exchange()
    assert isinstance(cohort.clients[VICTIM], Unmasked)
    assert not stored(seed)
    cohort.give(VICTIM, client.RoundEnded())
    assert isinstance(cohort.clients[VICTIM], Ended)


def test_an_abort_forgets_everything_and_stays_aborted() -> None:
    cohort = delivered()
    state = cohort.clients[VICTIM]
    aborted, answer = client.abort(state, client.RoundViolation("test", "reason"))
    assert {*vars(aborted)} == {"context", "answer"}
    again, same = client.handle(aborted, client.SharesReceived(delivery_for(cohort)))
    assert (again, same) == (aborted, answer)


def test_an_event_out_of_turn_raises_and_changes_nothing() -> None:
    cohort = unmasking()
    fresh = client.begin(
        client_context("device-009"), certificate("device-009"), identity("device-009"), entropy(1)
    )
    for event in (
        client.InputMasked(describe(b"x")),
        client.SurvivorsReceived(survivor_set({0, 1, 2, 3}), identity(VICTIM)),
        client.UnmaskRequested(request_for(cohort)),
    ):
        with pytest.raises(IllegalEvent):
            client.handle(fresh, event)


def test_secrets_do_not_show_in_a_repr() -> None:
    cohort = delivered()
    cohort.deliver()
    state = cohort.clients[VICTIM]
    assert isinstance(state, Masking)
    for secret in (state.mask_private, *state.secrets.opening_keys.values(), state.secrets.seed):
        assert repr(secret) not in repr(state)
    assert not any(repr(mask.key) in repr(state.masks()) for mask in state.masks())


def test_server_and_clients_agree_on_the_phases() -> None:
    cohort = Cohort(4)
    assert isinstance(cohort.server, Advertising)
    cohort.advertise()
    assert isinstance(cohort.server, Sharing)
    assert cohort.server.context.plan_hash == PLAN_HASH


def test_a_graph_that_the_server_picks_is_refused() -> None:
    """Real members with true paths to the root, and not those that the roster's hash makes neighbours."""
    graph = GraphAssumptions(corrupt_fraction=0.05, adversary="semi-honest")
    cohort = Cohort(70, reboot=False, graph=graph)
    cohort.advertise()
    roster = roster_for(cohort)
    shown = {entry.index for entry in roster.entries}
    assert isinstance(cohort.server, Sharing)
    stranger = next(m.entry for m in cohort.server.cohort.members if m.entry.index not in shown)
    own = cohort.server.cohort.index[VICTIM]
    dropped = next(entry for entry in roster.entries if entry.index != own)
    entries = tuple(stranger if entry is dropped else entry for entry in roster.entries)
    picked = roster.model_copy(update={"entries": entries})
    assert code(give_roster(cohort, picked)) == "wrong-graph"
