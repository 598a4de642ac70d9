"""Who broke the rules for sure, where shares do not fit the secret that they belong to.

A wrong share says that its dealer or its holder lied, and not which of the two: whoever deals one wrong share
makes its holder look like a liar. What can be told rests on how many clients may be corrupt.

- Whoever contradicts more others than may be corrupt contradicts an honest one, so it lied itself.
- A secret that cannot be recovered from more shares than the threshold was dealt wrongly, or more than one of
  its holders lied. If nearly all other secrets are good, its owner is blamed: the other explanation is that
  several clients gave up stopping the round for one victim, which an operator can let in again. Unless its
  owner is excluded, one client stops every round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from protocol.secagg.parameters import GraphParameters
from protocol.secagg.shamir import is_decodable


def corrupt_peers(graph: GraphParameters) -> int:
    """How many of a client's neighbours may be corrupt: what the threshold of its graph is made for.

    Fewer than a third of a complete graph (Bonawitz et al. 2017, Theorem 6.5), fewer than the threshold on a
    regular one (event E1 of `protocol.secagg.parameters`); at least one, as a round may always have a liar.
    """
    return max(1, (graph.size - 1) // 3 if graph.complete else graph.threshold - 1)


def liars(graph: GraphParameters, wrong: Mapping[int, Collection[int]]) -> frozenset[int]:
    """The clients that lied for sure.

    Args:
        graph: of the round.
        wrong: owner of a secret -> the holders whose shares of it are wrong.

    Guarantee: no honest client is among them.
    Assumes: no client has more than `corrupt_peers` corrupt neighbours.
    """
    against: dict[int, set[int]] = {}
    for owner, holders in wrong.items():
        for holder in holders:
            against.setdefault(owner, set()).add(holder)
            against.setdefault(holder, set()).add(owner)
    return frozenset(client for client, others in against.items() if len(others) > corrupt_peers(graph))


def dealt_wrongly(graph: GraphParameters, shares: Mapping[int, Mapping[int, bytes]], lost: int) -> bool:
    """Whether the owner of a secret that could not be recovered is to blame.

    Args:
        graph: of the round.
        shares: owner -> x coordinate -> share, of all secrets.
        lost: the owner of the one that could not be recovered.

    Guarantee: a single liar among the holders cannot bring it about.
    """
    if len(shares[lost]) <= graph.threshold:
        return False
    unclear = sum(not is_decodable(shares[owner], graph.threshold) for owner in shares if owner != lost)
    return unclear < corrupt_peers(graph)
