"""Transfers over a pipe that loses, repeats and reorders: they end with the same bytes."""

from __future__ import annotations

import hashlib
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import chunk_count
from protocol.errors import TransferError
from protocol.messages import CHUNK_BYTES, WINDOW, BlobNeed
from protocol.transfer import Reception, chunks, describe


def blob_of(size: int) -> bytes:
    return hashlib.shake_128(size.to_bytes(8, "big")).digest(size)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12 * CHUNK_BYTES), st.integers(0, 2**32), st.floats(0, 0.7))
def test_what_arrives_is_what_was_sent(size: int, seed: int, loss: float) -> None:
    # Of a generator: chance that is drawn example by example may lose everything for ever.
    draw = np.random.default_rng(seed).random
    data = blob_of(size)
    blob = describe(data)
    reception, need = Reception.begin(blob).ask()
    stored: dict[int, bytes] = {}
    pipe: deque[BlobNeed | None] = deque([need])
    for _ in range(2_000):
        if reception.complete:
            break
        if not pipe:
            reception, need = reception.ask(again=True)  # the time-out
            pipe.append(need)
        request = pipe.popleft()
        if request is None or draw() < loss:
            continue
        if draw() < 0.1:
            pipe.append(request)
        if draw() < 0.05:
            reception = Reception.begin(blob, stored)  # the receiver restarts with what it stored
        for chunk, body in chunks(blob, data, request.indices):
            if draw() < loss:
                continue
            stored[chunk.index] = bytes(body)
            reception = reception.store(chunk.index)
            assert len(reception.asked) <= WINDOW
            reception, need = reception.ask()
            pipe.append(need)
    assert reception.complete
    assert b"".join(stored[i] for i in range(chunk_count(size))) == data


def test_the_window_is_never_exceeded_and_only_missing_chunks_are_asked_for() -> None:
    blob = describe(blob_of(10 * CHUNK_BYTES))
    reception, need = Reception.begin(blob, stored=[0, 2]).ask()
    assert need is not None
    assert need.indices == (1, 3, 4, 5)
    assert reception.ask()[1] is None
    reception, need = reception.store(4).ask()
    assert need is not None
    assert need.indices == (6,)
    _, again = reception.ask(again=True)
    assert again is not None
    assert again.indices == (1, 3, 5, 6)


def test_a_sender_with_other_bytes_says_so() -> None:
    with pytest.raises(TransferError, match="not 5"):
        list(chunks(describe(b"abcde"), b"abcd", [0]))
    assert list(chunks(describe(b"abcde"), b"abcde", [7])) == []
