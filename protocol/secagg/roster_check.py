"""A client's checks of a roster: what it must see before it shares a secret with anybody in it."""

from __future__ import annotations

from protocol.errors import RoundViolation
from protocol.identity import verify
from protocol.messages import AdvertiseKeys, Roster, RosterEntry
from protocol.secagg import roster as rosters
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.client_state import Membership, Peer, RoundContext
from protocol.secagg.graph import neighbours
from protocol.secagg.key_agreement import check_public_key
from protocol.secagg.parameters import GraphParameters, NoGraph, parameters


def require(condition: bool, code: str, detail: str) -> None:
    """Raises RoundViolation unless `condition` holds."""
    if not condition:
        raise RoundViolation(code, detail)


def verify_roster(
    context: RoundContext, own: AdvertiseKeys, roster: Roster, now: int, certificates: CertificateCache
) -> Membership:
    """Checks a roster against the plan, the fleet CA, its own root and the graph that follows from it.

    Raises:
        RoundViolation, BadSignature, MalformedMessage: a check failed; the message says which.
    """
    require(
        context.minimum_cohort <= roster.size <= context.maximum_cohort,
        "cohort-size",
        f"a cohort of {roster.size} where {context.minimum_cohort} to {context.maximum_cohort} were agreed",
    )
    entries = {entry.index: entry for entry in roster.entries}
    require(
        len(entries) == len(roster.entries) and max(entries, default=roster.size) < roster.size,
        "roster-indices",
        "the roster repeats an index or goes beyond its size",
    )
    try:
        graph = parameters(roster.size, context.split.assumptions(roster.size, context.graph))
    except NoGraph as error:
        raise RoundViolation("no-graph", str(error)) from error
    leaves = {index: rosters.leaf_hash(entry) for index, entry in entries.items()}
    own_leaf = rosters.leaf_hash(own)
    mine = [index for index, leaf in leaves.items() if leaf == own_leaf]
    require(len(mine) == 1, "not-in-roster", "this client's own check-in is not in the roster once")
    index = mine[0]
    name = rosters.roster_hash(context.round_id, context.plan_hash, roster.size, roster.root)
    _check_root(roster, entries, leaves, graph)
    near = neighbours(graph, name, index)
    require(
        entries.keys() == {*near, index}, "wrong-graph", "the roster does not show the graph's neighbours"
    )
    peers, names = {}, {index: context.device_id}
    for peer in near:
        names[peer], peers[peer] = _verify_entry(context, entries[peer], now, certificates)
    _check_order([names[place] for place in sorted(names)])
    numbers = {context.split.number_of(name, context.plan_hash) for name in names.values()}
    require(len(numbers) == 1, "wrong-subcohort", "the roster has devices of another sub-cohort of the plan")
    return Membership(name, graph, index, peers)


def _check_order(names: list[str]) -> None:
    """Device ids ascend with the indices.

    A device that stands in the roster twice breaks the order around it, also for clients that see it once.
    """
    require(len(set(names)) == len(names), "repeated-device", "a device is in the roster twice")
    require(names == sorted(names), "roster-order", "the roster is not in the order of the device ids")


def _check_root(
    roster: Roster, entries: dict[int, RosterEntry], leaves: dict[int, bytes], graph: GraphParameters
) -> None:
    if graph.complete:
        require(len(entries) == roster.size, "wrong-graph", "a complete graph shows the whole roster")
        roots = {rosters.merkle_tree([leaves[i] for i in range(roster.size)])[-1][0]}
    else:
        roots = {
            rosters.root_from_path(leaves[index], index, roster.size, entry.path)
            for index, entry in entries.items()
        }
    require(roots == {roster.root}, "roster-root", "the roster's entries do not lead to its root")


def _verify_entry(
    context: RoundContext, entry: RosterEntry, now: int, certificates: CertificateCache
) -> tuple[str, Peer]:
    certificate = certificates.verify(entry.certificate, context.ca, now=now)
    payload = rosters.advertisement_payload(
        context.fleet, context.round_id, context.plan_hash, entry.encryption_key, entry.mask_key
    )
    verify(certificate.public_key, rosters.ADVERTISE_KIND, payload, entry.signature)
    check_public_key(entry.encryption_key)
    check_public_key(entry.mask_key)
    peer = Peer(certificate.public_key.public_bytes_raw(), entry.encryption_key, entry.mask_key)
    return certificate.device_id, peer
