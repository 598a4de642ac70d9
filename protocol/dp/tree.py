"""DP-FTRL's noise: one draw in each node of a binary tree over rounds, so that it hardly adds up. Pure.

The sum of the first t updates of a tree is released with the noise of the nodes that cover [1, t]: at most
log2(t) + 1 of them, where independent noise in every round would make it t (Kairouz et al. 2021, arXiv
2103.00039, Algorithm 1 and appendix B; Dwork et al. 2010, Chan et al. 2011). What a round releases is the
increment of that noisy sum, which the server optimizer adds up again: post-processing.

Guarantee: all releases of one tree are a function of the noisy sums of its nodes. A device that is in one
    round of the tree is in at most `TreeNoise.height` of these (Theorem 4.1, with sensitivity sqrt(height)).
Assumes: no device is in two rounds of one tree; the tree's key is secret, and is kept until its last round.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from protocol.dp.errors import NoiseKeyError
from protocol.dp.parameters import TreeNoise
from protocol.dp.sampling import IntegerSampler
from protocol.secagg.prg import derive_key

Node = tuple[int, int]
"""Level (0 for leaves) and place in it: (k, i) covers the leaves from i 2^k + 1 to (i + 1) 2^k."""

_CHUNK = 1 << 16


def nodes(leaf: int) -> frozenset[Node]:
    """The nodes that cover leaves 1 to `leaf`, one for each binary digit that is 1; none for 0."""
    found, start = set(), 0
    for level in reversed(range(leaf.bit_length())):
        if leaf >> level & 1:
            found.add((level, start >> level))
            start += 1 << level
    return frozenset(found)


def increment(after: int, leaf: int) -> tuple[frozenset[Node], frozenset[Node]]:
    """Which nodes' noise comes and which goes between the releases of leaf `after` (0: none yet) and `leaf`.

    Raises:
        NoiseKeyError: the leaf is not after the last released one, whose noise must not be drawn again.
    """
    if not 0 <= after < leaf:
        raise NoiseKeyError(f"leaf {leaf} of a noise tree does not follow on {after}, the last one released")
    new, old = nodes(leaf), nodes(after)
    return new - old, old - new


def add_increment(
    integers: NDArray[np.int32], sampler: IntegerSampler, key: bytes, *, after: int, leaf: int
) -> None:
    """Adds the increment of the tree's noise in place; the same for the same key and leaves, every time.

    Args:
        integers: int32, shape (n,); sums stay far below 2^31.
        sampler: of one node's noise.
        key: 32 secret bytes, of this tree only.
        after: the last leaf that was released, 0 for none.
        leaf: of this round.

    Raises:
        NoiseKeyError: the leaf is not after the last released one.
    """
    coming, going = increment(after, leaf)
    for sign, changed in ((1, coming), (-1, going)):
        for node in sorted(changed):
            secret = _node_key(key, node)
            for start in range(0, integers.size, _CHUNK):
                chunk = integers[start : start + _CHUNK]
                chunk += np.int32(sign) * sampler.sample(secret, start, chunk.size)


def rotation_seed(tree: TreeNoise) -> bytes:
    """The public seed of the rotation, one for a tree: noise cancels only in the same coordinates."""
    return hashlib.sha256(b"covey/v1/tree-rotation" + bytes.fromhex(tree.tree)).digest()


def _node_key(key: bytes, node: Node) -> bytes:
    level, place = node
    return derive_key(key, purpose="dp/tree-node", context=bytes([level]) + place.to_bytes(4, "big"))
