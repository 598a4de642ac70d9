"""Unmasking on all cores: processes of this one that draw keystreams, and end with it.

Processes and not threads, as drawing a keystream holds the interpreter's lock (cryptography 46: while one
call drew 400 MB, no other thread ran). They get the masks of a sum, which the aggregator knows anyway, and
never leave the machine.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import wait

import numpy as np
from numpy.typing import NDArray

from protocol.secagg.masking import Mask, apply_masks, remove_masks

logger = logging.getLogger(__name__)


class Cores:
    """Takes masks off a sum on as many cores as this process may use.

    The workers start when a sum is first large enough, and stay: rounds come one after the other. One that is
    killed costs time and no bits, since its part is done here.

    Example:
        with Cores() as cores:
            cores.unmask(total, recovered.masks)
    """

    def __init__(self, workers: int | None = None) -> None:
        """Prepares for `workers` processes; by default one for each core."""
        self._workers = _cores() if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None

    def unmask(self, vector: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
        """Does what `apply_masks(vector, masks)` does, with the same bits."""
        try:
            remove_masks(vector, masks, self._started, self._workers)
        except BrokenExecutor:
            # Nothing was handed out yet. The next sum gets new workers.
            logger.warning("a worker died since the last sum: unmasking on one core")
            self.close()
            apply_masks(vector, masks)

    def _started(self) -> Executor:
        if self._pool is None:
            # A fork would copy the broker connection's thread in whatever state it is.
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin)
        return self._pool

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Cores:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers."""
        self.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """A worker's first act."""
    # Ctrl-C reaches the whole process group; the service decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent has, however that ended; the pool's own pipes would stay open."""
    wait([sentinel])
    os._exit(1)
