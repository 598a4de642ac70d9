"""The roster: signed check-ins under one Merkle root, and the sets and signatures that refer to it.

The tree hashes as RFC 6962, section 2.1 (leaf and node prefixes; an odd node moves up unchanged).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from protocol.errors import MalformedMessage
from protocol.messages import AdvertiseKeys, RosterEntry

ADVERTISE_KIND = "advertise-keys"
SURVIVORS_KIND = "survivor-set"


def _join(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def advertisement_payload(
    fleet: str, round_id: str, plan_hash: bytes, encryption_key: bytes, mask_key: bytes
) -> bytes:
    """What a client signs at check-in: its keys are good for this plan of this round, and no other."""
    return _join(fleet.encode(), bytes.fromhex(round_id), plan_hash, encryption_key, mask_key)


def leaf_hash(entry: AdvertiseKeys | RosterEntry) -> bytes:
    """The leaf of one client's check-in."""
    data = _join(entry.certificate, entry.encryption_key, entry.mask_key, entry.signature)
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def merkle_tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree, from the leaves to the root."""
    levels = [list(leaves)]
    while len(levels[-1]) > 1:
        level = levels[-1]
        above = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        levels.append([*above, level[-1]] if len(level) % 2 else above)
    return levels


def merkle_path(tree: list[list[bytes]], index: int) -> tuple[bytes, ...]:
    """The siblings that lead from the leaf at `index` to the root."""
    path = []
    for level in tree[:-1]:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        index //= 2
    return tuple(path)


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that a leaf and its path lead to.

    Raises:
        MalformedMessage: the path has a wrong length for this place.
    """
    siblings = iter(path)
    node = leaf
    try:
        while size > 1:
            if index ^ 1 < size:
                sibling = next(siblings)
                node = _node(sibling, node) if index % 2 else _node(node, sibling)
            index, size = index // 2, (size + 1) // 2
    except StopIteration as error:
        raise MalformedMessage("the path to the roster root is too short") from error
    if next(siblings, None) is not None:
        raise MalformedMessage("the path to the roster root is too long")
    return node


def roster_hash(round_id: str, plan_hash: bytes, size: int, root: bytes) -> bytes:
    """Names a roster, its round and its plan in 32 bytes; everything later in the round is bound to it."""
    data = _join(b"covey/v1/roster", bytes.fromhex(round_id), plan_hash, size.to_bytes(4, "big"), root)
    return hashlib.sha256(data).digest()


def members_to_bytes(members: Iterable[int], size: int) -> bytes:
    """A set of roster indices as a bit map of ceil(size / 8) bytes."""
    bits = bytearray(-(-size // 8))
    for index in members:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def members_from_bytes(data: bytes, size: int) -> frozenset[int]:
    """Parses `members_to_bytes`.

    Raises:
        MalformedMessage: a wrong length, or a member beyond the roster.
    """
    if len(data) != -(-size // 8):
        raise MalformedMessage(f"a set over {size} clients has {-(-size // 8)} bytes, not {len(data)}")
    members = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
    if members.size and members[-1] >= size:
        raise MalformedMessage("the set names a client beyond the roster")
    return frozenset(members.tolist())


def survivors_hash(roster: bytes, members: bytes) -> bytes:
    """Names a survivor set of a roster in 32 bytes: what survivors sign."""
    return hashlib.sha256(_join(b"covey/v1/survivors", roster, members)).digest()
