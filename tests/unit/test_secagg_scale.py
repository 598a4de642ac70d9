"""What lets a server of ten thousand clients scale, and still be the same pure machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadSignature
from protocol.messages import ClientAbort, ShareDelivery, UnmaskRequest
from protocol.secagg import server
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.graph import all_neighbours, neighbours
from protocol.secagg.growing import GrowingMap
from protocol.secagg.parameters import GraphAssumptions, parameters
from protocol.secagg.roster import members_from_bytes, members_to_bytes
from protocol.secagg.server_state import Recovered, Unmasking
from tests.secagg_round import CA, NOW, ROUND_ID, Cohort, certificate, entropy


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=30))
def test_every_version_of_a_growing_map_keeps_its_content(steps: list[tuple[int, int]]) -> None:
    """Grows from random earlier versions, next to plain dictionaries that are copied."""
    versions: list[tuple[GrowingMap[int, int], dict[int, int]]] = [(GrowingMap(), {})]
    for key, back in steps:
        grown, plain = versions[-1 - back % len(versions)]
        if key in plain:
            with pytest.raises(KeyError):
                grown.with_item(key, 0)
            continue
        versions.append((grown.with_item(key, back), {**plain, key: back}))
    for grown, plain in versions:
        assert dict(grown) == plain == {key: grown[key] for key in grown}
        assert list(grown) == list(plain)
        assert len(grown) == len(plain)
        assert grown == plain
        for key in range(31):
            assert (key in grown) == (key in plain)
            assert grown.get(key) == plain.get(key)


def test_a_growing_map_starts_from_pairs_and_refuses_what_came_later() -> None:
    first = GrowingMap([("a", 1), ("b", 2), ("a", 3)])
    second = first.with_item("c", 4)
    assert (dict(first), dict(second)) == ({"a": 3, "b": 2}, {"a": 3, "b": 2, "c": 4})
    with pytest.raises(KeyError):
        first["c"]
    for key in first:
        first = first.with_item(key + "'", 0)  # growing while an older version is walked
    assert repr(second) == "GrowingMap({'a': 3, 'b': 2, 'c': 4})"


@pytest.mark.parametrize("size", [2, 64, 100, 301])
def test_all_neighbours_are_the_neighbours_of_each(size: int) -> None:
    graph = parameters(size, GraphAssumptions(adversary="semi-honest"))
    name = entropy("roster", size)
    assert all_neighbours(graph, name) == tuple(neighbours(graph, name, i) for i in range(size))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_sets_go_through_their_bytes(size: int) -> None:
    members = frozenset(range(0, size, 3))
    assert members_from_bytes(members_to_bytes(members, size), size) == members
    assert members_from_bytes(bytes(-(-size // 8)), size) == frozenset()


@pytest.mark.parametrize("degree", [None, 6])
def test_an_unmask_request_holds_a_quorum_and_no_more(degree: int | None) -> None:
    graph = GraphAssumptions(
        corrupt_fraction=0.0, adversary="semi-honest", complete_up_to=2 if degree else 64
    )
    cohort = Cohort(14, graph=graph)
    for step in (cohort.advertise, cohort.exchange, cohort.deliver, cohort.upload, cohort.exchange):
        step()
    assert isinstance(cohort.server, Unmasking)
    shape = cohort.server.cohort.graph
    for device, index in cohort.server.cohort.index.items():
        request = server.request(cohort.server, device)
        assert isinstance(request, UnmaskRequest)
        others = {*request.signatures.indices()} - {index}
        assert len(others) == shape.threshold - shape.complete
    cohort.exchange()
    assert isinstance(cohort.server, Recovered)


def test_who_shared_no_keys_gets_no_shares() -> None:
    cohort = Cohort(6)
    cohort.advertise()
    cohort.drop("device-005")
    cohort.exchange()
    delivery = server.request(cohort.server, "device-005")
    assert isinstance(delivery, ShareDelivery)
    assert delivery.shares.indices() == []
    other = server.request(cohort.server, "device-000")
    assert isinstance(other, ShareDelivery)
    assert other.shares.indices() == [1, 2, 3, 4]


def test_the_count_of_those_awaited_is_the_count_of_their_names() -> None:
    """Through a whole round with dropouts and departures, after every event."""
    cohort = Cohort(9)
    receive, seen = cohort.receive, []

    def check() -> None:
        seen.append(server.pending(cohort.server))
        assert seen[-1] == len(server.awaited(cohort.server))

    def watched(device: str, message: server.ClientMessage) -> None:
        receive(device, message)
        check()

    cohort.receive = watched  # type: ignore[method-assign]
    gone = ClientAbort(round_id=ROUND_ID, code="test")
    cohort.receive("device-008", gone)
    cohort.drop("device-008")
    for step in (cohort.advertise, cohort.exchange, cohort.deliver, cohort.upload, cohort.exchange):
        step()
        check()
    cohort.receive("device-003", gone)
    cohort.drop("device-003")
    cohort.exchange()
    check()
    assert isinstance(cohort.server, Recovered)
    assert seen[-1] == 0 < max(seen)


class TestCertificateCache:
    def test_it_says_what_the_check_says(self) -> None:
        cache = CertificateCache()
        first = cache.verify(certificate("device-001"), CA, now=NOW)
        assert cache.verify(certificate("device-001"), CA, now=NOW) is first
        assert first.device_id == "device-001"

    def test_a_known_certificate_still_expires(self) -> None:
        cache = CertificateCache()
        cache.verify(certificate("device-001"), CA, now=NOW)
        for now in (NOW + 366 * 86_400, NOW - 2 * 86_400):
            with pytest.raises(BadSignature, match="expired or not yet valid"):
                cache.verify(certificate("device-001"), CA, now=now)
        cache.verify(certificate("device-001"), CA, now=NOW)

    def test_it_forgets_nothing_of_the_check(self) -> None:
        cache, known = CertificateCache(), certificate("device-001")
        cache.verify(known, CA, now=NOW)
        for der, ca in ((known[:-1] + bytes([known[-1] ^ 1]), CA), (known, certificate("device-002"))):
            for _ in range(2):  # a failure is not remembered as a success either
                with pytest.raises(BadSignature):
                    cache.verify(der, ca, now=NOW)

    def test_its_size_is_bounded(self) -> None:
        cache = CertificateCache(limit=2)
        for device in ("device-001", "device-002", "device-003", "device-001"):
            assert cache.verify(certificate(device), CA, now=NOW).device_id == device
        assert len(cache._known) == 2
