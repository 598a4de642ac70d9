"""Rows of columns that are not where they belong: of another neighbour, another message, another round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import decode_from_device, decode_to_device, encode
from protocol.columns import INDEX, SealedColumn, ShareColumn
from protocol.errors import MalformedMessage
from protocol.messages import ShareDelivery, ShareKeys, UnmaskingShares
from protocol.secagg import client, server
from protocol.secagg.client_state import Unmasked
from protocol.secagg.graph import all_neighbours
from protocol.secagg.parameters import GraphAssumptions, parameters
from protocol.secagg.routing import SealedMail, incoming_edges
from protocol.secagg.server_state import Collecting, Recovered
from tests.secagg_round import Cohort, certificate, dealt, entropy, identity

VICTIM = "device-000"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.booleans(), st.data())
def test_mail_brings_each_client_what_was_sealed_for_it(
    size: int, complete: bool, data: st.DataObject
) -> None:
    """Next to dictionaries, for any graph and whoever sent nothing."""
    graph = parameters(
        size,
        GraphAssumptions(
            corrupt_fraction=0,
            dropout_fraction=0,
            adversary="semi-honest",
            complete_up_to=64 if complete else 2,
        ),
    )
    near = all_neighbours(graph, entropy("mail", size))
    senders = data.draw(st.sets(st.integers(0, size - 1)))
    sealed = {
        (sender, peer): sender.to_bytes(2, "big") + peer.to_bytes(2, "big") + bytes(78)
        for sender in senders
        for peer in near[sender]
    }
    rows = {sender: b"".join(sealed[sender, peer] for peer in near[sender]) for sender in senders}
    array = np.array(near, INDEX)
    mail = SealedMail(array, incoming_edges(array), rows)
    for receiver in range(size):
        expected = {
            sender: sealed[sender, receiver]
            for sender in near[receiver]
            if sender in senders and receiver in senders
        }
        assert mail.to(receiver).by_peer() == expected


def collecting(size: int = 5) -> Cohort:
    cohort = Cohort(size)
    cohort.advertise()
    cohort.exchange()
    assert isinstance(cohort.server, Collecting)
    return cohort


def delivery_for(cohort: Cohort, device: str = VICTIM) -> ShareDelivery:
    request = server.request(cohort.server, device)
    assert isinstance(request, ShareDelivery)
    return request


def answer_to(cohort: Cohort, delivery: ShareDelivery) -> UnmaskingShares:
    """What the victim gives away in a round in which it was delivered this; the round must end well."""
    for device in sorted(cohort.alive):
        cohort.give(device, client.SharesReceived(delivery) if device == VICTIM else cohort.event_for(device))
    cohort.upload()
    cohort.exchange()
    cohort.exchange()
    end, state = cohort.server, cohort.clients[VICTIM]
    assert isinstance(end, Recovered) and isinstance(state, Unmasked)
    assert (cohort.unmasked(end) == cohort.sum_of(cohort.names(end.survivors))).all()
    return state.answer


def test_rows_of_other_neighbours_are_opened_by_nobody_and_stop_no_round() -> None:
    cohort = collecting()
    delivery = delivery_for(cohort)
    rows = delivery.shares.by_peer()
    swapped = SealedColumn.of({**rows, 1: rows[2], 2: rows[1]})
    given_away = answer_to(cohort, delivery.model_copy(update={"shares": swapped})).shares.by_peer()
    assert given_away == {owner: dealt(f"device-{owner:03d}", 0, 5)[0] for owner in (0, 3, 4)}


def again(cohort: Cohort) -> Cohort:
    """The same devices in another round: other keys."""
    for device, state in cohort.clients.items():
        own = certificate(device)
        cohort.clients[device] = client.begin(state.context, own, identity(device), entropy("again", device))
    return cohort


def sent_by_itself(cohort: Cohort) -> SealedColumn:
    answer = cohort.give(VICTIM, cohort.event_for(VICTIM))
    assert isinstance(answer, ShareKeys)
    return answer.shares


@pytest.mark.parametrize("rows", ["of another receiver", "of another round", "its own, sent back"])
def test_a_column_is_good_for_its_own_message_and_round(rows: str) -> None:
    """Rows that are sealed for somebody else, or were, open for nobody: all that is left is its own share."""
    cohort = collecting()
    delivery = delivery_for(cohort)
    if rows == "of another receiver":
        stale = delivery_for(cohort, "device-001").shares.by_peer()
    elif rows == "of another round":
        other = again(Cohort(5))
        other.advertise()
        other.exchange()
        stale = delivery_for(other).shares.by_peer()
    else:
        fresh = Cohort(5)
        fresh.advertise()
        stale = sent_by_itself(fresh).by_peer()
    garbage = dict.fromkeys(delivery.shares.indices(), bytes(82))
    replayed = {peer: stale.get(peer, garbage[peer]) for peer in garbage}
    delivery = delivery.model_copy(update={"shares": SealedColumn.of(replayed)})
    assert answer_to(cohort, delivery).shares.by_peer() == {0: dealt(VICTIM, 0, 5)[0]}


def test_a_body_under_the_header_of_another_message_is_refused_or_harmless() -> None:
    """Bodies of equal width are columns of either message; what they say is checked there."""
    frames: dict[str, bytes] = {}
    cohort = Cohort(5)
    cohort.advertise()
    for step in (cohort.exchange, cohort.deliver, cohort.upload, cohort.exchange, cohort.exchange):
        if step != cohort.upload and not isinstance(cohort.server, Recovered):
            asked = server.request(cohort.server, VICTIM)
            frames[asked.type] = encode(asked)  # type: ignore[union-attr, arg-type]
        step()
        answer = getattr(cohort.clients[VICTIM], "answer", None)
        if answer is not None:
            frames[answer.type] = encode(answer)
    kinds = [kind for kind in frames if kind in WIDTHS]
    assert sorted(kinds) == sorted(WIDTHS)
    for header in kinds:
        decode = decode_from_device if header in ("share-keys", "unmasking-shares") else decode_to_device
        for body in kinds:
            mixed = head(frames[header]) + frames[body][len(head(frames[body])) :]
            if WIDTHS[header] == WIDTHS[body]:
                assert decode(mixed)[0].type == header
            else:
                with pytest.raises(MalformedMessage, match="no column"):
                    decode(mixed)


WIDTHS = {"share-keys": 82, "share-delivery": 82, "unmask-request": 64, "unmasking-shares": 33}


def head(frame: bytes) -> bytes:
    return frame[: 4 + int.from_bytes(frame[:4], "little")]


def test_a_share_of_the_wrong_kind_is_named_and_the_sum_is_right() -> None:
    """A client that gives away the key share of a survivor contradicts all others; nobody learns the key."""
    cohort = Cohort(7)
    cohort.advertise()
    cohort.exchange()
    cohort.deliver()
    cohort.upload(drop=frozenset({"device-006"}))
    cohort.exchange()
    for device in sorted(cohort.alive):
        answer = cohort.give(device, cohort.event_for(device))
        assert isinstance(answer, UnmaskingShares)
        if device == "device-002":
            wrong = {o: dealt(f"device-{o:03d}", 2, 7)[o != 6] for o in answer.shares.indices()}
            answer = answer.model_copy(update={"shares": ShareColumn.of(wrong)})
        cohort.receive(device, answer)
    cohort.close()
    end = cohort.server
    assert isinstance(end, Recovered)
    assert end.misbehaved == {2}
    assert (cohort.unmasked(end) == cohort.sum_of(cohort.names(end.survivors))).all()
