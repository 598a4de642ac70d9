"""The one vector of a sub-cohort that the aggregator keeps: the sum of the masked inputs so far.

Those of a round's sub-cohorts lie one behind the other, each beginning at a whole slice, in the repository,
packed as the inputs are.
An input is added in the transaction that enters it into the exactly-once ledger and drops its chunks: it is
in the sum once or not at all, whatever is killed when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from aggregator.repository import Reader, Writer
from protocol import ring
from protocol.dp.mechanism import EncodingParameters
from protocol.fields import BlobRef
from protocol.secagg.packing import SliceAdder, SlicePacker, sum_words

SLICE = 65_536
"""Elements in a slice: a multiple of `ring.GROUP`, so that slices begin at whole bytes."""

_WORD = np.dtype("<u8")


class UnusableInput(Exception):
    """A complete upload that is no masked input; nothing was added.

    Attributes:
        code: what the receipt says.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def input_size(encoding: EncodingParameters) -> int:
    """Bytes of one masked input."""
    return ring.packed_size(encoding.length, encoding.bits)


def add_input(
    writer: Writer,
    round_id: str,
    device_id: str,
    blob: BlobRef,
    encoding: EncodingParameters,
    subcohort: int,
) -> None:
    """Checks a complete upload, adds it to the partial sum of its sub-cohort and forgets it.

    It never holds more than a slice.

    Raises:
        UnusableInput: another digest than announced, or no ring vector; nothing was added.
        Conflict: an input of this device is in the sum; the transaction must not be committed.
    """
    _check(writer.chunks(round_id, device_id), blob, encoding)
    writer.note_input(round_id, device_id, blob.sha256)
    adder = SliceAdder(encoding.bits, min(encoding.length, SLICE))
    start, place = 0, _place(encoding, subcohort)
    for packed in _regroup(writer.chunks(round_id, device_id), SLICE // ring.GROUP * encoding.bits):
        count = min(SLICE, encoding.length - start)
        before = writer.sum_slice(round_id, place + start)
        words = sum_words(count, encoding.bits)
        total = np.zeros(words, np.uint64) if before is None else np.frombuffer(before, _WORD).copy()
        adder.add(total, packed, count)
        writer.put_sum_slice(round_id, place + start, total.astype(_WORD, copy=False).tobytes())
        start += count
    writer.drop_upload(round_id, device_id)


def load_sum(
    reader: Reader, round_id: str, encoding: EncodingParameters, subcohort: int
) -> NDArray[np.uint32]:
    """Reads the whole partial sum of one sub-cohort.

    Returns:
        uint32, shape (encoding.length,), modulo 2^bits.

    Raises:
        ValueError: no input was added, or the slices are of another encoding.
    """
    total, place = np.empty(encoding.length, np.uint32), _place(encoding, subcohort)
    packer = SlicePacker(encoding.bits, min(encoding.length, SLICE))
    for start in range(0, encoding.length, SLICE):
        data = reader.sum_slice(round_id, place + start)
        if data is None:
            raise ValueError(f"the partial sum of round {round_id} has no slice at {start}")
        count = min(SLICE, encoding.length - start)
        size = ring.packed_size(count, encoding.bits)
        packer.unpack(memoryview(data)[:size], total[start : start + count])
    return total


def _place(encoding: EncodingParameters, subcohort: int) -> int:
    return subcohort * (-(-encoding.length // SLICE) * SLICE)


def _check(chunks: Iterable[bytes], blob: BlobRef, encoding: EncodingParameters) -> None:
    # Before anything is added, since a transaction may hold the work of other devices.
    digest, size, last = hashlib.sha256(), 0, 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        last = chunk[-1]
    if size != input_size(encoding):
        raise UnusableInput("wrong-size")
    if digest.hexdigest() != blob.sha256:
        raise UnusableInput("wrong-digest")
    if last >> (8 - (8 * size - encoding.length * encoding.bits)):
        raise UnusableInput("wrong-padding")


def _regroup(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Cuts a stream of chunks into pieces of `size` bytes; the last one may be shorter."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)
