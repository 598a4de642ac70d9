"""Flower's SecAgg+ at the same task, by Flower's own functions; runs in the peers' environment only.

    .venv-peers/bin/python benchmarks/secagg_flower.py '{"n": 10, "d": 1000000, ...}'

Prints CPU seconds and upload bytes as JSON. The client is `secaggplus_mod` without its message objects:
`_setup`, `_share_keys`, `_collect_masked_vectors`, `_unmask`. The server repeats the loops of the collect
and unmask stages of `SecAggPlusWorkflow` over the same functions. Quantising is left out on both sides, as
Covey's encoding is no part of its secure aggregation. Peers of the measured client are stand-ins with real
keys, whose shares are real in size and sealing.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarray_to_bytes, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

client: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

MODULUS = 2**32
SETUP = {
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 2**22,
    Key.MOD_RANGE: MODULUS,
    Key.MAX_WEIGHT: 1000.0,
}
"""The defaults of SecAggPlusWorkflow."""


class Stopwatch:
    """CPU time of this process, all threads, without what is excluded."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        self.seconds += time.process_time() - start
        return result

    def exclude(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            start = time.process_time()
            result = function(*arguments)
            self.seconds -= time.process_time() - start
            return result

        return wrapped


def run_client(holders: int, threshold: int, length: int) -> tuple[float, int]:
    """One client among `holders` (itself included); returns CPU seconds and upload bytes."""
    watch, own = Stopwatch(), 1
    quantize, client.quantize = client.quantize, watch.exclude(client.quantize)
    state = client.SecAggPlusState()
    state.nid = own
    setup = {Key.SAMPLE_NUMBER: holders, Key.SHARE_NUMBER: holders, Key.THRESHOLD: threshold, **SETUP}
    sent = watch.measure(client._setup, state, setup)
    upload = sum(map(len, sent.values()))

    peers = {nid: (generate_key_pairs(), generate_key_pairs()) for nid in range(2, holders + 1)}
    keys = {
        str(nid): (public_key_to_bytes(p1), public_key_to_bytes(p2))
        for nid, ((_, p1), (_, p2)) in peers.items()
    }
    sent = watch.measure(client._share_keys, state, {str(own): (state.pk1, state.pk2), **keys})
    upload += sum(map(len, sent[Key.CIPHERTEXT_LIST]))

    share = create_shares(bytes(32), 2, 2)[0], create_shares(state.sk1, 2, 2)[0]
    sealed = [
        encrypt(
            generate_shared_key(s2, bytes_to_public_key(state.pk2)),
            share_keys_plaintext_concat(nid, own, *share),
        )
        for nid, (_, (s2, _)) in peers.items()
    ]
    update = ndarrays_to_parameters([np.random.default_rng(0).normal(size=length).astype(np.float32)])
    configs = {Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: list(peers)}
    parse, client.parameters_to_ndarrays = (
        client.parameters_to_ndarrays,
        watch.exclude(client.parameters_to_ndarrays),
    )
    sent = watch.measure(client._collect_masked_vectors, state, configs, 1000, update)
    client.quantize, client.parameters_to_ndarrays = quantize, parse
    upload += sum(map(len, sent[Key.MASKED_PARAMETERS]))

    gone = max(1, (holders - 1) // 10)
    alive = [own, *list(peers)[:-gone]]
    sent = watch.measure(
        client._unmask, state, {Key.ACTIVE_NODE_ID_LIST: alive, Key.DEAD_NODE_ID_LIST: list(peers)[-gone:]}
    )
    return watch.seconds, upload + sum(map(len, sent[Key.SHARE_LIST]))


def run_server(n: int, survivors: int, holders: int, threshold: int, length: int) -> float:
    """The collect and unmask stages over real secrets and shares; returns CPU seconds."""
    secret, public = generate_key_pairs()
    private = private_key_to_bytes(secret)
    seed_shares = create_shares(bytes(range(32)), threshold, holders)
    key_shares = create_shares(private, threshold, holders)
    # On the complete graph of n every survivor answers for everyone; else a share of the neighbours does.
    answers = max(threshold, round(holders * survivors / n))
    masked = [ndarray_to_bytes(np.arange(length, dtype=np.int64))]
    start = time.process_time()
    total: list[Any] | None = None
    for _ in range(survivors):
        vector = [bytes_to_ndarray(data) for data in masked]
        total = vector if total is None else parameters_addition(total, vector)
    assert total is not None
    total = parameters_mod(total, MODULUS)
    for index in range(n):
        shares = (seed_shares if index < survivors else key_shares)[:answers]
        recovered = combine_shares(shares)
        if index < survivors:
            mask = pseudo_rand_gen(recovered, MODULUS, get_parameters_shape(total))
            total = parameters_subtraction(total, mask)
            continue
        for neighbour in range(holders - 1):
            shared = generate_shared_key(
                bytes_to_private_key(recovered), bytes_to_public_key(public_key_to_bytes(public))
            )
            mask = pseudo_rand_gen(shared, MODULUS, get_parameters_shape(total))
            operation = parameters_addition if neighbour % 2 else parameters_subtraction
            total = operation(total, mask)
    parameters_mod(total, MODULUS)
    return time.process_time() - start


def main() -> None:
    """Runs the case in the first argument and prints what it took."""
    logging.disable(logging.CRITICAL)
    case = json.loads(sys.argv[1])
    holders, threshold = case["holders"], case["threshold"]
    runs = [run_client(holders, threshold, case["d"]) for _ in range(case["repeats"])]
    server = None
    if case["server"]:
        server = min(
            run_server(case["n"], case["survivors"], holders, threshold, case["d"])
            for _ in range(case["repeats"])
        )
    json.dump(
        {"client_cpu_s": min(run[0] for run in runs), "server_cpu_s": server, "upload_bytes": runs[0][1]},
        sys.stdout,
    )


if __name__ == "__main__":
    main()
