"""Graphs and rosters: symmetric, regular, determined by the roster, and provable entry by entry."""

from __future__ import annotations

import contextlib
import time
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import MAX_FRAME_BYTES, encode
from protocol.errors import MalformedMessage
from protocol.identity import create_ca, issue_certificate
from protocol.messages import Roster, RosterEntry
from protocol.secagg.graph import neighbours
from protocol.secagg.parameters import (
    MAX_COMPLETE,
    MAX_DEGREE,
    GraphAssumptions,
    GraphParameters,
    NoGraph,
    parameters,
)
from protocol.secagg.roster import (
    members_from_bytes,
    members_to_bytes,
    merkle_path,
    merkle_tree,
    root_from_path,
)
from tests.secagg_round import CA_KEY, NOW, ROUND_ID, entropy


@pytest.mark.parametrize("size", [2, 3, 9, 10, 64])
def test_a_small_cohort_gets_the_complete_graph_and_a_two_thirds_threshold(size: int) -> None:
    graph = parameters(size, GraphAssumptions())
    assert graph.complete
    assert neighbours(graph, entropy("r"), 1) == tuple(i for i in range(size) if i != 1)
    # Two quorums overlap in more than a third: with fewer than a third corrupt, in an honest client.
    assert 2 * graph.threshold - size > size / 3


@pytest.mark.parametrize(
    ("size", "dropout", "adversary", "degree", "threshold"),
    [
        (100, 0.1, "semi-honest", 22, 11),
        (1000, 0.1, "semi-honest", 48, 27),
        (1000, 0.3, "semi-honest", 88, 36),
        (100, 0.1, "malicious", 32, 22),
        (1000, 0.1, "malicious", 96, 67),
    ],
)
def test_parameters_reach_the_reference_values(
    size: int, dropout: float, adversary: str, degree: int, threshold: int
) -> None:
    """Never a larger graph than the reference one: gamma = 0.1, sigma = 40, eta = 20.

    Four of the five are met exactly. At n = 1000 and 10 % dropout the exact tails allow (46, 26), with
    2^-40.9 for E1 and 2^-23.0 for E3.
    """
    assumptions = GraphAssumptions.model_validate(
        {"corrupt_fraction": 0.1, "dropout_fraction": dropout, "adversary": adversary}
    )
    graph = parameters(size, assumptions)
    expected = (46, 26) if (degree, threshold) == (48, 27) else (degree, threshold)
    assert (graph.degree, graph.threshold) == expected


def test_the_tails_are_hypergeometric() -> None:
    """Against exact integer arithmetic: E1 and E3 hold for this graph, and for none smaller."""

    def tail(size: int, marked: int, degree: int, count: int) -> Fraction:
        ways = sum(
            comb(marked, i) * comb(size - 1 - marked, degree - i)
            for i in range(count, min(marked, degree) + 1)
        )
        return size * Fraction(ways, comb(size - 1, degree))

    for size in (200, 1000, 5000):
        graph = parameters(size, GraphAssumptions(adversary="semi-honest"))
        marked = size // 10
        assert tail(size, marked, graph.degree, graph.threshold) <= Fraction(1, 2**40)
        assert tail(size, marked, graph.degree, graph.degree - graph.threshold + 1) <= Fraction(1, 2**20)
        smaller = graph.degree - 2
        assert not any(
            tail(size, marked, smaller, t) <= Fraction(1, 2**40)
            and tail(size, marked, smaller, smaller - t + 1) <= Fraction(1, 2**20)
            for t in range(1, smaller + 1)
        )


@pytest.mark.parametrize("size", [513, 1000, 2**14])
@pytest.mark.parametrize("fraction", [0.3, 0.333])
def test_a_graph_that_no_roster_could_show_is_refused_at_once(size: int, fraction: float) -> None:
    """Else a signed plan of extreme assumptions busied a device for minutes, and stopped the aggregator."""
    assumptions = GraphAssumptions(corrupt_fraction=fraction, dropout_fraction=fraction)
    started = time.process_time()
    with pytest.raises(NoGraph, match="neighbours"):
        parameters(size, assumptions)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(("entries", "path"), [(MAX_COMPLETE, 0), (MAX_DEGREE + 1, 14)])
def test_the_largest_roster_fits_a_frame(entries: int, path: int) -> None:
    longest = create_ca(CA_KEY, "f" * 63, now=NOW, days=1, serial=2**158)
    certificate = issue_certificate(
        CA_KEY, longest, "d" * 63, CA_KEY.public_key(), now=NOW, days=1, serial=2**158
    )
    entry = RosterEntry(
        index=2**14 - 1,
        certificate=certificate,
        encryption_key=bytes(32),
        mask_key=bytes(32),
        signature=bytes(64),
        path=(bytes(32),) * path,
    )
    roster = Roster(round_id=ROUND_ID, size=2**14, root=bytes(32), entries=(entry,) * entries)
    assert len(encode(roster)) < MAX_FRAME_BYTES


def test_degree_grows_with_the_logarithm_of_the_cohort() -> None:
    degrees = [parameters(size, GraphAssumptions()).degree for size in (100, 1_000, 10_000)]
    assert degrees == sorted(degrees)
    assert degrees[2] - degrees[1] < degrees[1] - degrees[0]


def test_a_regular_graph_is_symmetric_and_follows_from_the_roster() -> None:
    graph = GraphParameters(101, 12, 7)
    near = [neighbours(graph, entropy("roster"), i) for i in range(101)]
    assert all(len(set(peers)) == 12 and i not in peers for i, peers in enumerate(near))
    assert all(i in near[peer] for i, peers in enumerate(near) for peer in peers)
    assert near != [neighbours(graph, entropy("another roster"), i) for i in range(101)]


@given(st.integers(1, 70), st.data())
def test_every_leaf_proves_its_place_and_no_other(size: int, data: st.DataObject) -> None:
    leaves = [entropy("leaf", i) for i in range(size)]
    tree = merkle_tree(leaves)
    index = data.draw(st.integers(0, size - 1))
    path = merkle_path(tree, index)
    assert root_from_path(leaves[index], index, size, path) == tree[-1][0]
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        with contextlib.suppress(MalformedMessage):
            assert root_from_path(leaves[index], other, size, path) != tree[-1][0]
    with pytest.raises(MalformedMessage, match="too long"):
        root_from_path(leaves[index], index, size, (*path, entropy("extra")))
    if path:
        with pytest.raises(MalformedMessage, match="too short"):
            root_from_path(leaves[index], index, size, path[:-1])


@given(st.integers(1, 200), st.data())
def test_sets_round_trip_as_bit_maps(size: int, data: st.DataObject) -> None:
    members = data.draw(st.frozensets(st.integers(0, size - 1)))
    assert members_from_bytes(members_to_bytes(members, size), size) == members


def test_a_set_of_a_wrong_size_is_refused() -> None:
    for wrong in (b"", b"\x00\x00", b"\xe0"):
        with pytest.raises(MalformedMessage):
            members_from_bytes(wrong, 5)


def test_a_graph_that_stands_grinding_has_more_neighbours_and_the_published_one_has_not() -> None:
    published = parameters(1_000, GraphAssumptions())
    assert (published.degree, published.threshold) == (96, 67)
    ground = parameters(1_000, GraphAssumptions(grinding_bits=40))
    assert (ground.degree, ground.threshold) == (120, 87)
    semi_honest = GraphAssumptions(adversary="semi-honest")
    tried = semi_honest.model_copy(update={"grinding_bits": 40})
    assert parameters(1_000, tried) == parameters(1_000, semi_honest)
