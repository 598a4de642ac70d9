"""One case of `benchmarks/secagg.py`: a round between a measured client, its cohort and a measured server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from benchmarks.secagg_cohort import (
    MEASURED,
    REAL_UP_TO,
    RealClient,
    StandIns,
    Stopwatch,
    begin,
    device_name,
)
from benchmarks.secagg_server import Report, serve
from protocol.codec import encode
from protocol.secagg import roster as rosters
from protocol.secagg.masking import apply_masks
from protocol.secagg.packing import SlicePacker
from protocol.secagg.parameters import GraphAssumptions, GraphParameters, parameters
from protocol.secagg.prg import SLICE_WORDS
from protocol.secagg.server_state import ServerContext
from tests.secagg_round import CA, FLEET, PLAN_HASH, ROUND_ID

QUANTIZATION_BITS = 16
INPUT_BYTES = 2**26
AT_ONCE = 25
"""Devices whose messages wait for the server at one time."""
UPLOADS_BYTES = 2**22
"""The same of masked inputs; one that is larger comes alone."""
PEER = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"
PEER_SCRIPT = Path(__file__).resolve().parent / "secagg_flower.py"

Progress = Callable[[str, float], None]
"""Called with what is going on and how far it is, 0 to 1."""


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        complete: the complete graph, else the regular graph for a semi-honest aggregator.
        peer_client, peer_server: whether Flower's side is run too.
        repeats: times that each step of a client is repeated; the fastest counts.
        rounds: whole rounds; of each part of the server the fastest counts.
    """

    n: int
    d: int
    dropout: float = 0.1
    complete: bool = False
    peer_client: bool = True
    peer_server: bool = False
    repeats: int = 3
    rounds: int = 1

    @property
    def bits(self) -> int:
        """Width of the ring: 16-bit values, and room for the sum of n."""
        return QUANTIZATION_BITS + ceil(log2(self.n))

    @property
    def assumptions(self) -> GraphAssumptions:
        """What the plan assumes."""
        return GraphAssumptions(
            corrupt_fraction=0.1,
            dropout_fraction=min(self.dropout, 0.5),
            adversary="semi-honest",
            complete_up_to=max(2, min(512, self.n)) if self.complete else 2,
        )

    @property
    def graph(self) -> GraphParameters:
        """Degree and threshold."""
        return parameters(self.n, self.assumptions)

    @property
    def survivors(self) -> range:
        """The roster indices that upload; the others drop out once their shares are delivered."""
        return range(self.n - round(self.n * self.dropout))


@dataclass(frozen=True)
class Outcome:
    """What a case took; CPU seconds, bytes."""

    case: Case
    client: Stopwatch
    server: Report
    warm_saving_s: float
    client_floor_s: float
    server_floor_s: float
    upload_bytes: int
    flower_client_s: float | None = None
    flower_server_s: float | None = None
    flower_upload_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys that reports and dashboards read; null where not run."""
        case, graph = self.case, self.case.graph
        client, server = self.client.cpu_s, self.server.cpu_s
        client_warm, server_warm = client - self.warm_saving_s, server - self.server.warm_saving_s
        shape = "complete" if graph.complete else f"k={graph.degree}"
        return {
            "n": case.n,
            "d": case.d,
            "dropout": case.dropout,
            "graph": f"{shape}, t={graph.threshold}",
            "client_cpu_s": client,
            "server_cpu_s": server,
            "client_over_floor": client / self.client_floor_s,
            "server_over_floor": server / self.server_floor_s,
            "client_speedup_vs_flower": self.flower_client_s and self.flower_client_s / client,
            "server_speedup_vs_flower": self.flower_server_s and self.flower_server_s / server,
            "server_peak_bytes": self.server.peak_bytes,
            "upload_bytes": self.upload_bytes,
            # As devices and the service remember certificates: of a second round with the same devices.
            "client_warm_cpu_s": client_warm,
            "server_warm_cpu_s": server_warm,
            "client_warm_over_floor": client_warm / self.client_floor_s,
            "server_warm_over_floor": server_warm / self.server_floor_s,
            "client_warm_speedup_vs_flower": self.flower_client_s and self.flower_client_s / client_warm,
            "server_warm_speedup_vs_flower": self.flower_server_s and self.flower_server_s / server_warm,
        }


def run(case: Case, progress: Progress, *, workers: int = 2, peer: bool = True) -> Outcome:
    """Runs a case; ratios are of figures from here, one after the other."""
    before = floor_units(case, max(3, case.repeats))
    outcome = _round(case, progress, workers)
    for _ in range(case.rounds - 1):
        again = _round(case, progress, workers)
        server = outcome.server.fastest(again.server)
        outcome = replace(min(outcome, again, key=lambda one: one.client.cpu_s), server=server)
    after = floor_units(case, max(3, case.repeats))
    keystream, addition, input_addition = map(min, before, after)
    outcome = replace(
        outcome,
        client_floor_s=(case.graph.degree + 1) * (keystream + addition),
        server_floor_s=case.n * input_addition + outcome.server.masks * (keystream + addition),
    )
    if not peer or not (case.peer_client or case.peer_server) or not PEER.exists():
        return outcome
    progress("Flower", 1.0)
    graph = case.graph
    wanted = {
        "n": case.n,
        "d": case.d,
        "holders": graph.degree + 1,
        "threshold": graph.threshold,
        "survivors": len(case.survivors),
        "server": case.peer_server,
        "repeats": min(case.repeats, 1 if case.n >= 100 else 3),
    }
    done = subprocess.run([PEER, PEER_SCRIPT, json.dumps(wanted)], check=True, capture_output=True, text=True)
    peers = json.loads(done.stdout.splitlines()[-1])
    return replace(
        outcome,
        flower_client_s=peers["client_cpu_s"],
        flower_server_s=peers["server_cpu_s"],
        flower_upload_bytes=peers["upload_bytes"],
    )


def floor_units(case: Case, repeats: int) -> tuple[float, float, float]:
    """CPU seconds of one raw ChaCha20 keystream of d words, and of its and of an input's addition.

    Nothing is allocated. A keystream was just drawn, so it is in the cache; an input is another vector each
    time, as many of them as a server gets, and up to twice the largest cache of this class of machine.
    """
    d = case.d
    zeros, target, total = bytes(4 * d), bytearray(4 * d), np.zeros(d, np.uint32)
    drawn = np.frombuffer(target, np.uint32)
    watch = Stopwatch(repeats)
    times = max(1, 10**6 // d)  # several in one reading, as the clock of a thread is coarse

    def keystreams() -> None:
        for _ in range(times):
            cipher = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None)
            cipher.encryptor().update_into(zeros, target)

    def additions() -> None:
        for _ in range(times):
            np.add(total, drawn, out=total)

    inputs = np.ones((max(1, min(case.n, INPUT_BYTES // (4 * d))), d), np.uint32)

    def sums() -> None:
        for vector in inputs:
            np.add(total, vector, out=total)

    return (
        watch.best(keystreams)[0] / times,
        watch.best(additions)[0] / times,
        watch.best(sums)[0] / len(inputs),
    )


def _round(case: Case, progress: Progress, workers: int) -> Outcome:
    names = [device_name(i) for i in range(case.n)]
    context = ServerContext(
        FLEET, ROUND_ID, PLAN_HASH, CA, frozenset(names), 2, len(case.survivors), case.assumptions
    )
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(
        target=serve, args=(there, context, case.d, case.bits, case.repeats, workers), daemon=False
    )
    process.start()
    there.close()
    try:
        return _play(case, progress, here, names)
    finally:
        here.close()
        process.join(10)
        if process.is_alive():
            process.kill()


def _play(case: Case, progress: Progress, server: Connection, names: list[str]) -> Outcome:
    watch = Stopwatch(case.repeats)
    measured = RealClient(MEASURED, case.n, case.assumptions, watch)
    real = {MEASURED: measured}
    if case.n <= REAL_UP_TO:
        real |= {i: RealClient(i, case.n, case.assumptions, None) for i in range(1, case.n)}
        states = []
    else:
        states = [measured.state]
        for i in range(1, case.n):
            progress("check in", i / case.n)
            states.append(begin(i, case.n, case.assumptions))

    def ask(indices: range) -> None:
        """Everybody gets what the server asks of it."""
        for start in range(0, len(indices), AT_ONCE):
            some = indices[start : start + AT_ONCE]
            server.send(("requests", [(names[i], i in real) for i in some]))
            for i, frame in zip(some, server.recv(), strict=True):
                if i in real:
                    real[i].receive(frame)

    def tell(indices: range, step: str, frame_of: Callable[[int], bytes]) -> None:
        """Everybody answers."""
        for start in range(0, len(indices), AT_ONCE):
            progress(step, start / case.n)
            some = indices[start : start + AT_ONCE]
            server.send(("messages", [(names[i], frame_of(i)) for i in some]))

    everyone = range(case.n)
    tell(everyone, "check in", lambda i: real[i].frame() if i in real else encode(states[i].answer))
    server.send(("close",))
    ask(everyone)
    others = StandIns(states, measured) if len(real) < case.n else None
    tell(everyone, "share keys", lambda i: real[i].frame() if i in real else others.share(i))  # type: ignore[union-attr]
    server.send(("close",))
    ask(everyone)
    vector = (
        np.random.default_rng(case.n).integers(0, 2**case.bits, case.d, dtype=np.uint64).astype(np.uint32)
    )
    waiting: list[tuple[str, list[tuple[int, bytes]]]] = []
    several = max(1, UPLOADS_BYTES * 8 // (case.d * case.bits))
    for index, slices in _inputs(case, progress, real, others, vector):
        waiting.append((names[index], slices))
        if len(waiting) == several or index == case.survivors[-1]:
            server.send(("stored", waiting))
            waiting = []
    server.send(("close",))
    members = rosters.members_to_bytes(case.survivors, case.n)
    name = rosters.survivors_hash(measured.state.membership.roster_hash, members)
    ask(case.survivors)
    tell(case.survivors, "sign", lambda i: real[i].frame() if i in real else others.sign(i, name))  # type: ignore[union-attr]
    server.send(("close",))
    ask(case.survivors)
    tell(
        case.survivors,
        "unmask",
        lambda i: real[i].frame() if i in real else others.unmask(i, case.survivors, name),  # type: ignore[union-attr]
    )
    server.send(("close",))
    server.send(("finish",))
    progress("remove masks", 1.0)
    report, total = server.recv()
    expected = vector * np.uint32(len(case.survivors)) & np.uint32(2**case.bits - 1)
    assert np.array_equal(np.frombuffer(total, np.uint32), expected), "the sum is wrong"
    return Outcome(case, watch, report, measured.warm_saving_s, 1.0, 1.0, measured.uploaded)


def _inputs(
    case: Case,
    progress: Progress,
    real: dict[int, RealClient],
    others: StandIns | None,
    vector: NDArray[np.uint32],
) -> Any:
    """Yields (index, packed slices) of every survivor."""
    plain: list[tuple[int, bytes]] = []
    for i in case.survivors:
        progress("masked inputs", i / case.n)
        if i in real:
            yield i, real[i].masked_input(vector, case.bits)
            continue
        assert others is not None
        plain = plain or _packed(vector, case.bits)
        if i == MEASURED + 1:
            progress("masks of the stand-ins", 0.0)
            odd = vector.copy()
            apply_masks(odd, others.remaining_masks(case.survivors))
            yield i, _packed(odd, case.bits)
        else:
            yield i, plain


def _packed(vector: NDArray[np.uint32], bits: int) -> list[tuple[int, bytes]]:
    packer = SlicePacker(bits)
    return [
        (start, packer.pack(vector[start : start + SLICE_WORDS]))
        for start in range(0, len(vector), SLICE_WORDS)
    ]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
