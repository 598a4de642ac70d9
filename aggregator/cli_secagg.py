"""The commands `covey secagg ...`: what secure aggregation takes, before a fleet is asked for it."""

from __future__ import annotations

import hashlib
import json as json_module
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from aggregator.cli_options import Json
from protocol.identity import sign, verify
from protocol.ring import MAX_BITS, MIN_BITS
from protocol.secagg.costs import DeviceCosts, device_costs
from protocol.secagg.parameters import ETA, SIGMA, GraphAssumptions, NoGraph, parameters

secagg_app = typer.Typer(no_args_is_help=True, help="Secure aggregation: its parameters and its price.")


@secagg_app.callback()
def _group() -> None:
    """Secure aggregation: its parameters and its price."""


@secagg_app.command("parameters")
def secagg_parameters(
    cohort: Annotated[int, typer.Option(min=2, max=16_384, help="Devices in a round.")],
    dropout: Annotated[float, typer.Option(help="Share of them that may drop out.")] = 0.1,
    corrupt: Annotated[float, typer.Option(help="Share that may collude with the aggregator.")] = 0.1,
    adversary: Annotated[
        Literal["semi-honest", "malicious"], typer.Option(help="What the aggregator may do.")
    ] = "malicious",
    grinding_bits: Annotated[
        int, typer.Option(min=0, max=128, help="A malicious one may try 2^this rosters; rounds stand 2^40.")
    ] = 0,
    dimension: Annotated[int, typer.Option(min=1, help="Elements of the vector.")] = 1_000_000,
    bits: Annotated[int, typer.Option(min=MIN_BITS, max=MAX_BITS, help="Width of the ring.")] = 20,
    json: Json = False,
) -> None:
    """Prints neighbours k and threshold t by the published bounds, with bytes and CPU time of a device.

    The CPU time is estimated for the machine that this runs on, from a short measurement of its primitives.

    Example: covey secagg parameters --cohort 1000 --dropout 0.1 --corrupt 0.1 --adversary malicious
    """
    try:
        assumptions = GraphAssumptions(
            corrupt_fraction=corrupt,
            dropout_fraction=dropout,
            adversary=adversary,
            grinding_bits=grinding_bits,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        option = str(first["loc"][0]).removesuffix("_fraction")
        raise typer.BadParameter(f"--{option}: {first['msg']}") from error
    try:
        graph = parameters(cohort, assumptions)
    except NoGraph as error:
        raise typer.BadParameter(str(error)) from error
    costs = device_costs(graph, dimension, bits)
    seconds = estimate_seconds(costs)
    figures = {
        "cohort": cohort,
        "graph": "complete" if graph.complete else "regular",
        "k": graph.degree,
        "t": graph.threshold,
        "security_bits": SIGMA,
        "correctness_bits": ETA,
        **asdict(costs),
        "cpu_seconds": seconds,
    }
    console = Console(highlight=False)
    if json:
        console.print_json(json_module.dumps(figures))
        return
    table = Table(show_header=False, title=f"{cohort} devices, {adversary} aggregator, {dimension} elements")
    kind = "complete graph" if graph.complete else "random regular graph"
    table.add_row("neighbours k, threshold t", f"{graph.degree}, {graph.threshold}  ({kind})")
    table.add_row("security, correctness", f"2^-{SIGMA}, 2^-{ETA}" if not graph.complete else "unconditional")
    table.add_row("masked input, sent", f"{costs.upload_bytes:,} bytes")
    table.add_row("control messages, sent", f"{costs.control_up_bytes:,} bytes")
    table.add_row("control messages, received", f"{costs.control_down_bytes:,} bytes")
    table.add_row("keystream", f"{costs.keystream_bytes:,} bytes")
    table.add_row("X25519, Ed25519 checks", f"{costs.x25519:,}, {costs.verifications:,}")
    table.add_row("field multiplications", f"{costs.field_products:,}")
    table.add_row("CPU time of a device, if it were this machine", f"{1000 * seconds:.1f} ms")
    console.print(table)


def estimate_seconds(costs: DeviceCosts) -> float:
    """CPU seconds of these operations on this machine: counts times a short measurement of each kind."""
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol.secagg.key_agreement import agree, public_key
    from protocol.secagg.masking import Mask, apply_masks
    from protocol.secagg.shamir import PRIME

    private, secret = hashlib.sha256(b"estimate").digest(), Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, signature = public_key(private), sign(secret, "estimate", b"")
    vector = np.zeros(65_536, np.uint32)
    field = PRIME // 3
    per_call = {
        "x25519": _seconds(lambda: agree(private, public, purpose="estimate", context=b"")),
        "signatures": _seconds(lambda: sign(secret, "estimate", b"")),
        "verifications": _seconds(lambda: verify(secret.public_key(), "estimate", b"", signature)),
        "field_products": _seconds(lambda: [field * 999 % PRIME for _ in range(1000)]) / 1000,
        "keystream_bytes": _seconds(lambda: apply_masks(vector, [Mask(private, False)])) / (4 * len(vector)),
    }
    counts = asdict(costs)
    return float(sum(counts[name] * seconds for name, seconds in per_call.items()))


def _seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call: the best of a few short runs."""
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(20):
            call()
        best = min(best, (time.process_time() - began) / 20)
    return best
