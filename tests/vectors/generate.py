"""Makes `secagg-v1.json`: run once per protocol version, then frozen.

    python -m tests.vectors.generate > tests/vectors/secagg-v1.json

A change of these bytes is a change of the protocol: it needs a new version and a new file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from protocol.codec import encode
from protocol.messages import ClientAbort, Roster, RoundEnd, ShareDelivery, UnmaskRequest
from protocol.secagg import client, server
from protocol.secagg import roster as rosters
from protocol.secagg.client_state import Masking, SharesSent
from protocol.secagg.graph import neighbours
from protocol.secagg.key_agreement import agree, public_key
from protocol.secagg.masking import pairwise_mask, seed_commitment, self_mask
from protocol.secagg.parameters import GraphAssumptions, parameters
from protocol.secagg.prg import Keystream, derive_key
from protocol.secagg.sealed_shares import channel, seal
from protocol.secagg.server_state import Recovered
from protocol.secagg.shamir import PRIME, split
from tests.secagg_round import PLAN_HASH, ROUND_ID, Cohort, entropy

SECRET, CONTEXT, ROSTER = entropy("secret"), entropy("context"), entropy("roster")


def primitives() -> dict[str, Any]:
    """Each building block by itself."""
    key = derive_key(SECRET, purpose="pairwise-mask", context=CONTEXT)
    mine, theirs = entropy("mine"), entropy("theirs")
    keys = channel(mine, public_key(theirs), ROSTER, 4, 2)
    shares = split(SECRET, 3, [1, 2, 3, 5, 8], Keystream(entropy("coefficients")))
    high = PRIME.to_bytes(33, "big").hex()
    return {
        "derive_key": {
            "secret": SECRET.hex(),
            "purpose": "pairwise-mask",
            "context": CONTEXT.hex(),
            "key": key.hex(),
        },
        "keystream": {"key": key.hex(), "start_word": 7, "words": Keystream(key).words(7, 6).tolist()},
        "agree": {
            "private": mine.hex(),
            "public": public_key(theirs).hex(),
            "purpose": "share-encryption",
            "context": CONTEXT.hex(),
            "key": agree(mine, public_key(theirs), purpose="share-encryption", context=CONTEXT).hex(),
            "bad_public": {"zero": "00" * 32, "one": "01" + "00" * 31},
        },
        "shamir": {
            "prime": hex(PRIME),
            "secret": SECRET.hex(),
            "threshold": 3,
            "coefficient_key": entropy("coefficients").hex(),
            "shares": {str(x): share.hex() for x, share in zip([1, 2, 3, 5, 8], shares, strict=True)},
            "bad_shares": {"not an element": high, "short": shares[0][1:].hex()},
        },
        "sealed_shares": {
            "private": mine.hex(),
            "public": public_key(theirs).hex(),
            "roster_hash": ROSTER.hex(),
            "sender": 4,
            "receiver": 2,
            "key_share": shares[0].hex(),
            "seed_share": shares[1].hex(),
            "sealed": seal(keys.sealing, ROSTER, 4, 2, (shares[0], shares[1])).hex(),
            "receiver_private": theirs.hex(),
        },
        "masks": {
            "roster_hash": ROSTER.hex(),
            "seed": SECRET.hex(),
            "self_mask_key": self_mask(SECRET, ROSTER, 3).key.hex(),
            "seed_commitment": seed_commitment(SECRET, ROSTER, 3).hex(),
            "pairwise_mask_key": pairwise_mask(mine, public_key(theirs), ROSTER, 3, 1).key.hex(),
            "index": 3,
            "peer": 1,
            "private": mine.hex(),
            "public": public_key(theirs).hex(),
        },
    }


def graphs() -> dict[str, Any]:
    """Degree, threshold and neighbours that follow from a roster hash."""
    graph = parameters(500, GraphAssumptions())
    leaves = [entropy("leaf", i) for i in range(5)]
    tree = rosters.merkle_tree(leaves)
    return {
        "regular": {
            "size": 500,
            "degree": graph.degree,
            "threshold": graph.threshold,
            "roster_hash": ROSTER.hex(),
            "neighbours_of_17": neighbours(graph, ROSTER, 17),
        },
        "merkle": {
            "leaves": [leaf.hex() for leaf in leaves],
            "root": tree[-1][0].hex(),
            "paths": [[node.hex() for node in rosters.merkle_path(tree, i)] for i in range(5)],
        },
        "roster_hash": rosters.roster_hash(ROUND_ID, PLAN_HASH, 5, tree[-1][0]).hex(),
        "survivors": {
            "members": [0, 2, 3],
            "bitmap": rosters.members_to_bytes({0, 2, 3}, 5).hex(),
            "hash": rosters.survivors_hash(ROSTER, rosters.members_to_bytes({0, 2, 3}, 5)).hex(),
            "bad_bitmaps": ["", "0d00", "2d"],
        },
    }


def whole_round() -> dict[str, Any]:
    """Four clients, the last drops out after the shares were delivered; every message of the first."""
    cohort = Cohort(4, length=6, reboot=False)
    seen: dict[str, Any] = {}
    first = "device-000"
    seen["advertise"] = encode(cohort.clients[first].answer).hex()  # type: ignore[arg-type, union-attr]
    cohort.advertise()
    roster = server.request(cohort.server, first)
    assert isinstance(roster, Roster)
    seen["roster"] = encode(roster).hex()
    cohort.exchange()
    state = cohort.clients[first]
    assert isinstance(state, SharesSent)
    seen["share_keys"] = encode(state.answer).hex()
    delivery = server.request(cohort.server, first)
    assert isinstance(delivery, ShareDelivery)
    seen["share_delivery"] = encode(delivery).hex()
    cohort.deliver()
    masking = cohort.clients[first]
    assert isinstance(masking, Masking)
    seen["inputs"] = {device: vector.tolist() for device, vector in cohort.inputs.items()}
    seen["masked"] = {device: cohort.masked(device).tolist() for device in sorted(cohort.inputs)[:3]}
    cohort.upload(drop=frozenset({"device-003"}))
    seen["survivor_set"] = encode(server.request(cohort.server, first)).hex()  # type: ignore[arg-type]
    cohort.exchange()
    request = server.request(cohort.server, first)
    assert isinstance(request, UnmaskRequest)
    seen["unmask_request"] = encode(request).hex()
    cohort.exchange()
    seen["unmasking_shares"] = encode(cohort.clients[first].answer).hex()  # type: ignore[arg-type, union-attr]
    end = cohort.server
    assert isinstance(end, Recovered)
    seen["sum"] = cohort.unmasked(end).tolist()
    return seen


def bad_frames() -> dict[str, str]:
    """Frames that every implementation refuses."""
    good = encode(RoundEnd(round_id=ROUND_ID, completed=True))
    header = good[4:]
    long = header.replace(b'"reason":""', b'"reason":"' + b"x" * 301 + b'"')
    return {
        "empty": "",
        "length only": good[:4].hex(),
        "truncated": good[:-1].hex(),
        "trailing byte": (good + b"\x00").hex(),
        "length beyond the frame": (b"\xff\xff\xff\x7f" + header).hex(),
        "unknown version": good.replace(b'"v":1', b'"v":9').hex(),
        "wrong direction": encode(ClientAbort(round_id=ROUND_ID, code="x")).hex(),
        "reason too long": (len(long).to_bytes(4, "little") + long).hex(),
        "not json": (b"\x02\x00\x00\x00{]").hex(),
    }


def make() -> dict[str, Any]:
    """The whole file."""
    assert client.TRANSITIONS
    return {
        "version": 1,
        "primitives": primitives(),
        "graphs": graphs(),
        "round": whole_round(),
        "bad_frames_to_device": bad_frames(),
    }


if __name__ == "__main__":
    json.dump(make(), sys.stdout, indent=1)
    sys.stdout.write("\n")
