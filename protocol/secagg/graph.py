"""Who shares secrets with whom: the complete graph, or a random k-regular graph (Bell et al. 2020).

Nobody chooses the graph: it follows from the roster hash, which covers every client's fresh signed keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.secagg.prg import Keystream, derive_key

COMPLETE_UP_TO = 64


@dataclass(frozen=True)
class GraphParameters:
    """Neighbours of each client, and shares that recover a secret.

    Attributes:
        size: clients in the graph.
        degree: neighbours of each client; size - 1 for the complete graph, else even.
        threshold: t, out of the degree + 1 holders of a secret (the neighbours and the client itself).
    """

    size: int
    degree: int
    threshold: int

    @property
    def complete(self) -> bool:
        """Everyone is everyone's neighbour."""
        return self.degree == self.size - 1


def parameters(size: int) -> GraphParameters:
    """Chooses degree and threshold for a cohort of `size` clients.

    A complete graph takes t = floor(2n/3) + 1: with an actively malicious aggregator and fewer than n/3
    colluding clients, no two survivor sets can both gather t consistent answers (Bonawitz et al. 2017,
    ePrint 2017/281, Theorem 6.5).

    Raises:
        ValueError: fewer than 2 clients, or more than a complete graph carries.
    """
    if not 2 <= size <= COMPLETE_UP_TO:
        raise ValueError(f"a complete graph has 2 to {COMPLETE_UP_TO} clients, not {size}")
    return GraphParameters(size, size - 1, 2 * size // 3 + 1)


def neighbours(graph: GraphParameters, roster_hash: bytes, index: int) -> tuple[int, ...]:
    """The roster indices of the neighbours of the client at `index`, ascending.

    On a k-regular graph the clients stand in a circle in an order drawn from the roster hash, each beside
    k/2 neighbours on either hand (a randomly relabelled Harary graph; Bell et al. 2020, ePrint 2020/704,
    Algorithm 1 and section 3.3).
    """
    if graph.complete:
        return tuple(i for i in range(graph.size) if i != index)
    stream = Keystream(derive_key(roster_hash, purpose="graph"))
    circle = np.argsort(np.frombuffer(stream.read(0, 8 * graph.size), dtype="<u8"), kind="stable")
    place = int(np.flatnonzero(circle == index)[0])
    steps = np.arange(1, graph.degree // 2 + 1)
    around = np.concatenate((place + steps, place - steps)) % graph.size
    return tuple(int(i) for i in np.sort(circle[around]))
