"""Degree and threshold of the graph, from what is assumed of the cohort, by the bounds of Bell et al. 2020.

Let n clients stand in a k-regular graph, gamma n of them corrupt, delta n of them dropping out. A graph is
good (Bell et al. 2020, ePrint 2020/704, section 3.2 for semi-honest, section 4 for malicious aggregators)
if every client

    E1  has too few corrupt neighbours to learn one of its secrets:
            semi-honest  |N(i) & corrupt| < t            (they hold fewer than t shares)
            malicious    |N(i) & corrupt| < 2t - k       (no two quorums of t overlap in corrupt clients only)
    E2  is connected to the others through clients that are neither corrupt nor dropped,
    E3  has at least t neighbours that survive, or its secrets are lost and the round fails.

E1 and E2 must fail with probability at most 2^-sigma (security), E3 with at most 2^-eta (correctness). A
client's neighbours are a uniform set of k others, so E1 and E3 are hypergeometric tails with a union bound
over n. To cut a randomly relabelled Harary graph, two runs of k/2 consecutive clients must be removed: fewer
than n^2 / 2 pairs of runs, each within the removed set with hypergeometric probability.

Grinding. The graph follows from the roster, and an aggregator that has a corrupt client's keys, or leaves
clients out, can try rosters until a graph suits it. With 2^g tries a union bound costs g bits, so a malicious
aggregator that may try 2^g rosters while a cohort checks in is met by a graph for 2^-(sigma + g). No
contribution of the clients would do instead: the graph must be known before shares are dealt, a client says
one thing before that, and whatever the seed is made of, the aggregator sees it first and still chooses whom
it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp, floor, lgamma, log
from typing import Annotated, Literal

from pydantic import Field

from protocol.errors import ProtocolError
from protocol.fields import Schema

SIGMA = 40
ETA = 20
GRINDING_BITS = 40
"""g of a plan, and what devices insist on: 2^40 rosters take hundreds of CPU days, and a check-in lasts a
minute or so."""
MAX_COMPLETE = 512
"""Clients of the largest complete graph: as many entries as a roster has room for."""
MAX_DEGREE = 360
"""Neighbours on a regular graph at most: each entry of the roster has its path to the root, and a certificate
with the longest names, and all of them fit one frame."""
_LN2 = log(2)


class NoGraph(ProtocolError, ValueError):
    """A cohort for which nobody could carry the graph that its assumptions ask for."""


class GraphAssumptions(Schema):
    """What a plan assumes of its cohort, and signs; the graph follows from it on both sides."""

    corrupt_fraction: Annotated[float, Field(ge=0, lt=1 / 3)] = 0.1
    """gamma: how many clients may collude with the aggregator."""
    dropout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """delta: how many clients may drop out once the graph stands."""
    adversary: Literal["semi-honest", "malicious"] = "malicious"
    grinding_bits: Annotated[int, Field(ge=0, le=128)] = 0
    """g: a malicious aggregator may try 2^g rosters; 0 gives the published bounds."""
    complete_up_to: Annotated[int, Field(ge=2, le=MAX_COMPLETE)] = 64
    """Cohorts of up to this many clients take the complete graph."""


@dataclass(frozen=True)
class GraphParameters:
    """Neighbours of each client, and shares that recover a secret.

    Attributes:
        size: clients in the graph.
        degree: neighbours of each client; size - 1 for the complete graph, else even.
        threshold: t, out of the holders of a secret. On the complete graph those are all clients, the owner
            too (Bonawitz et al. 2017); on a regular graph the neighbours only (Bell et al. 2020).
    """

    size: int
    degree: int
    threshold: int

    @property
    def complete(self) -> bool:
        """Everyone is everyone's neighbour."""
        return self.degree == self.size - 1


def parameters(size: int, assumptions: GraphAssumptions) -> GraphParameters:
    """Chooses degree and threshold for a cohort of `size` clients: the smallest degree that fits.

    A complete graph takes t = floor(2n/3) + 1: with an actively malicious aggregator and fewer than n/3
    colluding clients, no two survivor sets can both gather t consistent answers (Bonawitz et al. 2017,
    ePrint 2017/281, Theorem 6.5).

    Raises:
        ValueError: fewer than 2 clients.
        NoGraph: too many for the complete graph, and no regular one of at most MAX_DEGREE neighbours fits.
    """
    if size < 2:
        raise ValueError(f"a cohort has at least 2 clients, not {size}")
    if size > assumptions.complete_up_to:
        regular = _smallest_regular(
            size,
            assumptions.corrupt_fraction,
            assumptions.dropout_fraction,
            assumptions.adversary,
            SIGMA + (assumptions.grinding_bits if assumptions.adversary == "malicious" else 0),
        )
        if regular is not None:
            return regular
    if size > MAX_COMPLETE:
        raise NoGraph(
            f"{size} clients, {assumptions.corrupt_fraction:g} of them corrupt and "
            f"{assumptions.dropout_fraction:g} dropping out, need more than {MAX_DEGREE} neighbours each: "
            "split the cohort (subcohort_limit), or assume less"
        )
    return GraphParameters(size, size - 1, 2 * size // 3 + 1)


@lru_cache(maxsize=256)
def _smallest_regular(
    size: int, gamma: float, delta: float, adversary: str, sigma: int
) -> GraphParameters | None:
    corrupt, dropped = floor(gamma * size), floor(delta * size)
    for degree in range(2, min(size - 2, MAX_DEGREE) + 1, 2):
        if not _connected(size, corrupt + dropped, degree, sigma):
            continue
        limit = _least(size, corrupt, degree, sigma)  # corrupt neighbours stay below this
        threshold = limit if adversary == "semi-honest" else -(-(limit + degree) // 2)
        lost = _least(size, dropped, degree, ETA)  # dropped neighbours stay below this
        if max(1, threshold) <= degree - (lost - 1):
            return GraphParameters(size, degree, max(1, threshold))
    return None


def _least(size: int, marked: int, degree: int, bits: int) -> int:
    """The least m such that no client has m or more marked neighbours, but with probability 2^-bits."""
    tail = 0.0
    bound = exp(-bits * _LN2) / size
    for count in range(min(marked, degree), -1, -1):
        # A client is not its own neighbour: `marked` among the other size - 1.
        tail += exp(log_hypergeometric(size - 1, marked, degree, count))
        if tail > bound:
            return count + 1
    return 0


def _connected(size: int, removed: int, degree: int, sigma: int) -> bool:
    """Whether E2 holds: log of n^2/2 times the chance that `degree` given clients are all removed."""
    if removed < degree:
        return True
    chance = _log_choose(removed, degree) - _log_choose(size, degree)
    return 2 * log(size) - _LN2 + chance <= -sigma * _LN2


def log_hypergeometric(population: int, marked: int, drawn: int, count: int) -> float:
    """Log of the chance that `count` of `drawn` out of `population` are among the `marked` ones."""
    if count > marked or drawn - count > population - marked:
        return float("-inf")
    return (
        _log_choose(marked, count)
        + _log_choose(population - marked, drawn - count)
        - _log_choose(population, drawn)
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
