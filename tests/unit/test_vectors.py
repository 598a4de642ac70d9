"""The frozen vectors: bytes that a second implementation can be checked against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.codec import decode_to_device
from protocol.errors import BadSignature, MalformedMessage
from protocol.secagg.key_agreement import agree
from protocol.secagg.roster import members_from_bytes, root_from_path
from protocol.secagg.sealed_shares import channel, unseal
from protocol.secagg.shamir import UnrecoverableSecret, combine
from tests.vectors.generate import graphs, make

FILE = Path(__file__).parents[1] / "vectors" / "secagg-v1.json"
FROZEN: dict[str, Any] = json.loads(FILE.read_text())


@pytest.mark.parametrize("part", ["primitives", "graphs", "round", "bad_frames_to_device"])
def test_the_implementation_gives_the_frozen_bytes(part: str) -> None:
    assert json.loads(json.dumps(make()[part])) == FROZEN[part]


def test_shares_of_the_vector_recover_and_bad_ones_do_not() -> None:
    vector = FROZEN["primitives"]["shamir"]
    shares = {int(x): bytes.fromhex(share) for x, share in vector["shares"].items()}
    assert combine({x: shares[x] for x in (2, 5, 8)}).hex() == vector["secret"]
    for bad in vector["bad_shares"].values():
        with pytest.raises(UnrecoverableSecret):
            combine({**{x: shares[x] for x in (2, 5)}, 8: bytes.fromhex(bad)})


def test_the_sealed_shares_open_for_their_receiver_only() -> None:
    vector = FROZEN["primitives"]["sealed_shares"]
    sender_public = FROZEN["primitives"]["masks"]["private"]
    assert sender_public == vector["private"]
    from protocol.secagg.key_agreement import public_key

    public = public_key(bytes.fromhex(vector["private"]))
    private, roster_hash = bytes.fromhex(vector["receiver_private"]), bytes.fromhex(vector["roster_hash"])

    def opened(sender: int, receiver: int, sealed: bytes) -> tuple[bytes, bytes]:
        key = channel(private, public, roster_hash, receiver, sender).opening
        return unseal(key, roster_hash, sender, receiver, sealed)

    sealed = bytes.fromhex(vector["sealed"])
    key_share, seed_share = opened(vector["sender"], vector["receiver"], sealed)
    assert (key_share.hex(), seed_share.hex()) == (vector["key_share"], vector["seed_share"])
    for sender, receiver, data in ((2, 4, sealed), (4, 3, sealed), (4, 2, sealed[:-1] + b"\x00")):
        with pytest.raises(BadSignature):
            opened(sender, receiver, data)


def test_bad_vectors_are_refused() -> None:
    for public in FROZEN["primitives"]["agree"]["bad_public"].values():
        with pytest.raises(BadSignature):
            agree(bytes(31) + b"\x40", bytes.fromhex(public), purpose="p", context=b"")
    for frame in FROZEN["bad_frames_to_device"].values():
        with pytest.raises(MalformedMessage):
            decode_to_device(bytes.fromhex(frame))
    for bitmap in FROZEN["graphs"]["survivors"]["bad_bitmaps"]:
        with pytest.raises(MalformedMessage):
            members_from_bytes(bytes.fromhex(bitmap), 5)


def test_the_paths_of_the_vector_lead_to_its_root() -> None:
    merkle = graphs()["merkle"]
    for index, (leaf, path) in enumerate(zip(merkle["leaves"], merkle["paths"], strict=True)):
        nodes = [bytes.fromhex(node) for node in path]
        assert root_from_path(bytes.fromhex(leaf), index, 5, nodes).hex() == merkle["root"]


def test_the_sum_of_the_vector_is_the_sum_of_its_survivors() -> None:
    vector = FROZEN["round"]
    inputs = [np.array(vector["inputs"][f"device-00{i}"], dtype=np.uint32) for i in range(3)]
    assert np.add.reduce(inputs, dtype=np.uint32).tolist() == vector["sum"]
