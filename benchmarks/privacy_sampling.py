"""How fast is private encoding? Sampler throughput, and encode plus noise of a whole update.

Targets on the reference machine (2-core x86-64, one thread): 2*10^7 integers a second at standard deviation
30, and encoding 10^6 parameters within 150 ms.

    python benchmarks/privacy_sampling.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from protocol import ring
from protocol.dp.mechanism import decode, derive_encoding, encode, noise_sampler
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.dp.rotation import rotate
from protocol.dp.sampling import discrete_gaussian_sampler, skellam_sampler

REPEATS = 5
KEY = bytes(32)


def best_of(run: Callable[[], object]) -> float:
    """Shortest wall-clock seconds of several runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def sampler_row(name: str, stddev: float, count: int) -> dict[str, Any]:
    make = {"skellam": skellam_sampler, "discrete_gaussian": discrete_gaussian_sampler}[name]
    make.cache_clear()
    start = time.perf_counter()
    sampler = make(stddev**2)
    table_seconds = time.perf_counter() - start
    seconds = best_of(lambda: sampler.sample(KEY, 0, count))
    return {
        "distribution": name,
        "stddev": stddev,
        "integers_per_second": count / seconds,
        "table_seconds": table_seconds,
        "table_bytes": sampler._tops.nbytes + len(sampler._rests) + sampler._guide.nbytes,
        "distance": sampler.distance,
    }


def encode_row(dimension: int, bits: int, clients: int) -> dict[str, Any]:
    privacy = PrivacyParameters(
        mode=PrivacyMode.DISTRIBUTED,
        clip_norm=1.0,
        noise_multiplier=1.0,
        delta=1e-6,
        bits=bits,
        metric_slots=(MetricSlot(name="loss", bound=10.0),),
    )
    params = derive_encoding(
        privacy, dimension=dimension, minimum_survivors=clients, maximum_clients=clients, rotation_seed=KEY
    )
    noise_sampler(params)  # the table is made once for all rounds of a plan
    update = np.random.default_rng(0).standard_normal(dimension).astype(np.float32)
    vector = encode(update, {"loss": 1.0}, params, KEY)
    packed = ring.pack(vector, bits)
    return {
        "dimension": dimension,
        "bits": bits,
        "clients": clients,
        "radius": params.radius,
        "local_stddev": params.local_variance**0.5,
        "rotate_ms": 1e3 * best_of(lambda: rotate(update.copy(), KEY)),
        "encode_ms": 1e3 * best_of(lambda: encode(update, {"loss": 1.0}, params, KEY)),
        "pack_ms": 1e3 * best_of(lambda: ring.pack(vector, bits)),
        "unpack_ms": 1e3 * best_of(lambda: ring.unpack(packed, vector.size, bits)),
        "decode_ms": 1e3 * best_of(lambda: decode(vector, clients, params)),
        "wire_bytes": len(packed),
    }


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("  ".join(f"{name:>20}" for name in names))
    for row in rows:
        cells = (f"{row[n]:>20.4g}" if isinstance(row[n], float) else f"{row[n]:>20}" for n in names)
        print("  ".join(cells))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--count", type=int, default=4_000_000, help="integers to draw for each sampler")
    arguments = parser.parse_args()
    samplers = [
        sampler_row(name, stddev, arguments.count)
        for name in ("skellam", "discrete_gaussian")
        for stddev in (3.0, 30.0, 600.0, 8192.0)
    ]
    show(samplers)
    encodings = [
        encode_row(dimension, bits, clients)
        for dimension, bits, clients in [
            (9_098, 16, 10),
            (100_000, 16, 100),
            (10**6, 16, 100),
            (10**6, 20, 1000),
        ]
    ]
    show(encodings)
    if arguments.json:
        arguments.json.write_text(json.dumps({"samplers": samplers, "encodings": encodings}, indent=2))


if __name__ == "__main__":
    main()
