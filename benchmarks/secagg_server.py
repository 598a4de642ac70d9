"""The measured server of `benchmarks/secagg.py`: the real machine in a process of its own.

It gets the frames that devices send and answers with the frames that it would send, so that its CPU time and
its memory are its own. Nothing in here stands in for anything.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from benchmarks.secagg_worker import peak_bytes, peak_later, warm
from protocol import ring
from protocol.codec import decode_from_device, encode
from protocol.messages import AdvertiseKeys
from protocol.secagg import server
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.masking import PARALLEL_WORDS, remove_masks
from protocol.secagg.packing import SliceAdder, SlicePacker, sum_words
from protocol.secagg.prg import SLICE_WORDS
from protocol.secagg.server_state import Failed, Recovered, ServerContext, ServerState
from tests.secagg_round import Cohort

CODEC = "frames to messages and back"
NOW = 1_800_000_000

_PARTS = {
    "advertise-keys": "verify check-ins",
    "share-keys": "take and route shares",
    "consistency-signature": "verify signatures",
    "unmasking-shares": "take unmasking shares",
}
_CLOSES = {
    "Advertising": "roster and graph",
    "Sharing": "take and route shares",
    "Unmasking": "recover secrets",
}


@dataclass
class Report:
    """CPU seconds by part, and what it took.

    Attributes:
        warm_saving_s: how much less it is when certificates are those of an earlier round.
    """

    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_bytes: int = 0
    masks: int = 0
    warm_saving_s: float = 0.0
    parallel_wall_s: float | None = None

    def fastest(self, other: Report) -> Report:
        """The less of each part, of two runs of one round; the larger peak."""
        parts = {part: min(seconds, other.parts[part]) for part, seconds in self.parts.items()}
        walls = [wall for wall in (self.parallel_wall_s, other.parallel_wall_s) if wall is not None]
        return Report(
            parts,
            max(self.peak_bytes, other.peak_bytes),
            self.masks,
            min(self.warm_saving_s, other.warm_saving_s),
            min(walls) if walls else None,
        )

    @property
    def cpu_s(self) -> float:
        """All parts but the codec, which neither the floor nor the peer has."""
        return sum(seconds for part, seconds in self.parts.items() if part != CODEC)


@contextmanager
def _timed(report: Report, part: str) -> Iterator[None]:
    start = time.thread_time()
    yield
    report.parts[part] += time.thread_time() - start


def serve(
    connection: Connection, context: ServerContext, length: int, bits: int, repeats: int, workers: int
) -> None:
    """Runs one round by the commands that come; the last one is answered with a Report.

    A command has what many devices sent, or asks for what they get: a process that wakes up for every single
    message pays 10 to 20 us each time for cold caches, which neither the floor nor the peer does.
    """
    _warm_up()
    gc.collect()
    gc.freeze()  # as `covey aggregator run` does
    report = Report()
    state: ServerState = server.begin(context)
    adder = SliceAdder(bits, min(length, SLICE_WORDS))
    counts = {start: min(SLICE_WORDS, length - start) for start in range(0, length, SLICE_WORDS)}
    sums = {start: np.zeros(sum_words(count, bits), np.uint64) for start, count in counts.items()}
    while True:
        command, *arguments = connection.recv()
        if command == "messages":
            (sent,) = arguments
            for device_id, frame in sent:
                with _timed(report, CODEC):
                    message, _ = decode_from_device(frame)
                with _timed(report, _PARTS[message.type]):
                    state = server.handle(state, server.Received(device_id, message, NOW))  # type: ignore[arg-type]
                if isinstance(message, AdvertiseKeys):
                    report.warm_saving_s += _saved(context, message.certificate)
        elif command == "requests":
            asked, frames = arguments[0], []
            for device_id, wanted in asked:
                with _timed(report, "take and route shares"):
                    answer = server.request(state, device_id)
                assert answer is not None
                with _timed(report, CODEC):
                    frame = encode(answer)
                frames.append(frame if wanted else b"")
            connection.send(frames)
        elif command == "stored":
            (uploads,) = arguments
            for device_id, slices in uploads:
                # As the aggregator does it: an upload is added once it is complete.
                with _timed(report, "unpack and add inputs"):
                    for start, packed in slices:
                        adder.add(sums[start], packed, counts[start])
                    state = server.handle(state, server.InputStored(device_id))
        elif command == "close":
            with _timed(report, _CLOSES.get(type(state).__name__, "check quorums")):
                state = server.handle(state, server.ClosePhase())
            if isinstance(state, Failed):
                raise RuntimeError(f"{state.code}: {state.detail}")
        else:
            assert isinstance(state, Recovered), "the round is not over"
            assert not state.misbehaved, "an honest client was blamed"
            total, packer = np.empty(length, np.uint32), SlicePacker(bits, min(length, SLICE_WORDS))
            with _timed(report, "unpack and add inputs"):
                for start, count in counts.items():
                    size = ring.packed_size(count, bits)
                    packed = memoryview(sums.pop(start)).cast("B")[:size]
                    packer.unpack(packed, total[start : start + count])
            _finish(connection, report, state, total, bits, repeats, workers)
            return


def _warm_up() -> None:
    """A round of four before the one that is measured, as a service has run others: schemas are built."""
    cohort = Cohort(4, length=8, reboot=False)
    handle = cohort.receive

    def receive(device: str, message: server.ClientMessage) -> None:
        handle(device, decode_from_device(encode(message))[0])  # type: ignore[arg-type]
        asked = server.request(cohort.server, device)
        if asked is not None:
            encode(asked)

    cohort.receive = receive  # type: ignore[method-assign]
    cohort.run({"upload": {"device-003"}})


def _saved(context: ServerContext, certificate: bytes) -> float:
    """CPU seconds that a certificate of an earlier round does not take."""
    seconds = []
    for cache in (CertificateCache(), context.certificates):
        start = time.thread_time()
        cache.verify(certificate, context.ca, now=NOW)
        seconds.append(time.thread_time() - start)
    return seconds[0] - seconds[1]


def _finish(
    connection: Connection,
    report: Report,
    state: Recovered,
    total: NDArray[np.uint32],
    bits: int,
    repeats: int,
    workers: int,
) -> None:
    report.masks = len(state.masks)
    best = float("inf")
    for again in range(repeats):
        vector = total if again == repeats - 1 else total.copy()
        worth = len(total) * len(state.masks) >= PARALLEL_WORDS
        if again == repeats - 1 and workers > 1 and worth:
            report.parallel_wall_s, in_workers = _on_several_cores(total.copy(), state, workers)
            report.peak_bytes += in_workers
        start = time.thread_time()
        remove_masks(vector, state.masks)
        np.bitwise_and(vector, np.uint32(ring.modulus_mask(bits)), out=vector)
        best = min(best, time.thread_time() - start)
        del vector
    report.parts["remove masks"] = best
    report.peak_bytes += peak_bytes()
    report.parts = dict(report.parts)
    connection.send((report, total.tobytes()))


def _on_several_cores(vector: NDArray[np.uint32], state: Recovered, workers: int) -> tuple[float, int]:
    """Wall time of the same work in `workers` processes that are up already, and their peak memory."""
    # The product's workers import nothing of its command (`aggregator.command`); neither do these.
    vars(sys.modules["__main__"]).pop("__file__", None)
    executor: Executor
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        list(executor.map(warm, range(workers)))
        start = time.perf_counter()
        remove_masks(vector, state.masks, lambda: executor, workers)
        wall = time.perf_counter() - start
        return wall, sum(executor.map(peak_later, range(workers)))
