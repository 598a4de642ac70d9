"""What a round costs one device, from graph, dimension and ring alone: bytes, and operations by kind."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.codec import encode
from protocol.columns import SealedColumn, ShareColumn, SignatureColumn
from protocol.messages import (
    AdvertiseKeys,
    ConsistencySignature,
    Roster,
    RosterEntry,
    RoundEnd,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    UnmaskingShares,
    UnmaskRequest,
)
from protocol.ring import packed_size
from protocol.secagg.parameters import GraphParameters

_ROUND = "0" * 32
_CERTIFICATE_BYTES = 270
"""Of a device certificate: DER with a name of middling length."""


@dataclass(frozen=True)
class DeviceCosts:
    """One device's part of one round.

    Attributes:
        upload_bytes: the packed masked input.
        control_up_bytes: control messages that it sends, frames included.
        control_down_bytes: control messages that it gets, without the plan.
        keystream_bytes: ChaCha20 keystream that it draws: what costs a Pi energy.
        x25519: scalar multiplications.
        signatures: Ed25519, made.
        verifications: Ed25519, checked, certificates included.
        field_products: multiplications in GF(2^256 + 297).
    """

    upload_bytes: int
    control_up_bytes: int
    control_down_bytes: int
    keystream_bytes: int
    x25519: int
    signatures: int
    verifications: int
    field_products: int


def device_costs(graph: GraphParameters, dimension: int, bits: int) -> DeviceCosts:
    """Counts the work and traffic of one device in a round without dropouts.

    Args:
        graph: degree and threshold.
        dimension: elements of the vector.
        bits: width of the ring.
    """
    near, holders = graph.degree, graph.degree + graph.complete
    up = (
        AdvertiseKeys(
            round_id=_ROUND,
            certificate=bytes(_CERTIFICATE_BYTES),
            encryption_key=bytes(32),
            mask_key=bytes(32),
            signature=bytes(64),
        ),
        ShareKeys(
            round_id=_ROUND, roster_hash=bytes(32), seed_commitment=bytes(32), shares=_shares(graph, near)
        ),
        ConsistencySignature(round_id=_ROUND, survivors_hash=bytes(32), signature=bytes(64)),
        UnmaskingShares(
            round_id=_ROUND,
            survivors_hash=bytes(32),
            shares=ShareColumn.of(dict.fromkeys(_indices(graph, holders), bytes(ShareColumn.width))),
        ),
    )
    down = (
        Roster(round_id=_ROUND, size=graph.size, root=bytes(32), entries=_entries(graph)),
        ShareDelivery(round_id=_ROUND, roster_hash=bytes(32), shares=_shares(graph, near)),
        SurvivorSet(round_id=_ROUND, survivors=bytes(-(-graph.size // 8))),
        UnmaskRequest(
            round_id=_ROUND,
            survivors_hash=bytes(32),
            signatures=SignatureColumn.of(dict.fromkeys(_indices(graph, graph.threshold), bytes(64))),
        ),
        RoundEnd(round_id=_ROUND, completed=True),
    )
    return DeviceCosts(
        upload_bytes=packed_size(dimension, bits),
        control_up_bytes=sum(len(encode(message)) for message in up),
        control_down_bytes=sum(len(encode(message)) for message in down),
        keystream_bytes=4 * dimension * (near + 1),
        # Two key pairs, made and loaded; then, for each neighbour, the shares' channel and the pairwise mask.
        x25519=4 + 2 * near,
        signatures=2,
        verifications=2 * near + graph.threshold - graph.complete,
        field_products=2 * holders * (graph.threshold - 1),
    )


def _indices(graph: GraphParameters, count: int) -> range:
    """As many roster indices, from the upper end: the longest that can come."""
    return range(max(0, graph.size - count), graph.size)


def _shares(graph: GraphParameters, count: int) -> SealedColumn:
    return SealedColumn.of(dict.fromkeys(_indices(graph, count), bytes(SealedColumn.width)))


def _entries(graph: GraphParameters) -> tuple[RosterEntry, ...]:
    depth = 0 if graph.complete else (graph.size - 1).bit_length()
    return tuple(
        RosterEntry(
            index=i,
            certificate=bytes(_CERTIFICATE_BYTES),
            encryption_key=bytes(32),
            mask_key=bytes(32),
            signature=bytes(64),
            path=tuple(bytes(32) for _ in range(depth)),
        )
        for i in _indices(graph, graph.degree + 1)
    )
