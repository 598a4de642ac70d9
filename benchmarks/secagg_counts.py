"""Counts of the work of a round, from n, k, t and d alone: they are the same on every machine."""

from __future__ import annotations

from benchmarks.secagg_case import Case
from protocol.secagg.costs import device_costs


def counts(case: Case, masks: int) -> dict[str, int]:
    """Operations of one client and of the server.

    Products in GF(2^256 + 297): those of two field elements and those of an element with a small number are
    counted alike. An X25519 operation is one scalar multiplication; preparing a private key is one as well.

    Args:
        case: which round.
        masks: keystreams that the server takes off.
    """
    graph, n = case.graph, case.n
    client = device_costs(graph, case.d, case.bits)
    near, survivors = graph.degree, len(case.survivors)
    dropouts = n - survivors
    # Share-holders who answer, for an average secret; weights are made once where all secrets share them.
    answers = survivors if graph.complete else round(near * survivors / n)
    distinct = 1 if graph.complete else n
    weights = answers * answers + 3 * answers + graph.complete * answers * (answers - graph.threshold)
    # The checks of all shares at once, or one for each spare share.
    recovery = answers * (2 if graph.complete else 2 + answers - graph.threshold)
    return {
        "client: keystream bytes": client.keystream_bytes,
        "client: field products": client.field_products,
        "client: X25519": client.x25519,
        "client: Ed25519 signatures": client.signatures,
        "client: Ed25519 verifications": client.verifications,
        "server: keystream bytes": 4 * case.d * masks,
        "server: field products": n * recovery + distinct * weights,
        "server: X25519": masks - survivors + 3 * dropouts,
        "server: Ed25519 verifications": 2 * n + survivors,
    }
