"""Graphs and rosters: symmetric, regular, determined by the roster, and provable entry by entry."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedMessage
from protocol.secagg.graph import GraphParameters, neighbours, parameters
from protocol.secagg.roster import (
    members_from_bytes,
    members_to_bytes,
    merkle_path,
    merkle_tree,
    root_from_path,
)
from tests.secagg_round import entropy


@pytest.mark.parametrize("size", [2, 3, 9, 10, 64])
def test_a_small_cohort_gets_the_complete_graph_and_a_two_thirds_threshold(size: int) -> None:
    graph = parameters(size)
    assert graph.complete
    assert neighbours(graph, entropy("r"), 1) == tuple(i for i in range(size) if i != 1)
    # Two quorums overlap in more than a third: with fewer than a third corrupt, in an honest client.
    assert 2 * graph.threshold - size > size / 3


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
