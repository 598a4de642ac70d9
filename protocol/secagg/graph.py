"""Who shares secrets with whom: the complete graph, or a random k-regular graph (Bell et al. 2020).

Nobody chooses the graph: it follows from the roster hash, which covers every client's fresh signed keys.
"""

from __future__ import annotations

from collections.abc import Collection, Container

import numpy as np
from numpy.typing import NDArray

from protocol.secagg.parameters import GraphParameters
from protocol.secagg.prg import Keystream, derive_key


def neighbours(graph: GraphParameters, roster_hash: bytes, index: int) -> tuple[int, ...]:
    """The roster indices of the neighbours of the client at `index`, ascending.

    On a k-regular graph the clients stand in a circle in an order drawn from the roster hash, each beside
    k/2 neighbours on either hand (a randomly relabelled Harary graph; Bell et al. 2020, ePrint 2020/704,
    Algorithm 1 and section 3.3).
    """
    if graph.complete:
        return tuple(i for i in range(graph.size) if i != index)
    circle = _circle(graph, roster_hash)
    place = np.flatnonzero(circle == index)
    return tuple(_around(graph, circle, place)[0].tolist())


def all_neighbours(graph: GraphParameters, roster_hash: bytes) -> tuple[tuple[int, ...], ...]:
    """`neighbours` of every client, by index; the circle is drawn once."""
    if graph.complete:
        return tuple(neighbours(graph, roster_hash, index) for index in range(graph.size))
    circle = _circle(graph, roster_hash)
    places = np.empty(graph.size, np.int64)
    places[circle] = np.arange(graph.size)
    return tuple(tuple(near) for near in _around(graph, circle, places).tolist())


def _circle(graph: GraphParameters, roster_hash: bytes) -> NDArray[np.int64]:
    """Who stands at each place of the circle, int64, shape (size,)."""
    stream = Keystream(derive_key(roster_hash, purpose="graph"))
    return np.argsort(np.frombuffer(stream.read(0, 8 * graph.size), dtype="<u8"), kind="stable")


def _around(
    graph: GraphParameters, circle: NDArray[np.int64], places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Who stands around each of the `places`, ascending; int64, shape (len(places), degree)."""
    steps = np.arange(1, graph.degree // 2 + 1)
    offsets = np.concatenate((steps, -steps))
    return np.sort(circle[(places[:, None] + offsets) % graph.size], axis=1)


def quorum(graph: GraphParameters, index: int, near: Collection[int], present: Container[int]) -> bool:
    """Whether the threshold of those who hold shares of the client at `index` is `present`.

    Args:
        graph: degree and threshold.
        index: whose shares.
        near: its neighbours.
        present: roster indices that are still there.
    """
    own = graph.complete and index in present
    return sum(peer in present for peer in near) + own >= graph.threshold
