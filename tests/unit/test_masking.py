"""Masking slice by slice, and on several cores, gives the bits of the plain formula."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from protocol.secagg import masking
from protocol.secagg.masking import Mask, apply_masks, masked_slices, remove_masks
from protocol.secagg.prg import SLICE_WORDS, Keystream, derive_key

MASKS = tuple(Mask(derive_key(bytes([i]) * 32, purpose="test"), i % 3 == 0) for i in range(5))
LENGTHS = (0, 1, 15, 16, SLICE_WORDS - 1, SLICE_WORDS, SLICE_WORDS + 17, 3 * SLICE_WORDS + 5)


def vector(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 2**32, length, dtype=np.uint32)


def by_the_formula(values: np.ndarray, masks: tuple[Mask, ...]) -> np.ndarray:
    total = values.astype(np.uint64)
    for mask in masks:
        stream = Keystream(mask.key).words(0, len(values)).astype(np.uint64)
        total = total - stream if mask.negative else total + stream
    return (total & np.uint64(2**32 - 1)).astype(np.uint32)


@pytest.mark.parametrize("length", LENGTHS)
def test_masks_are_added_as_the_formula_says(length: int) -> None:
    values = vector(length)
    masked = values.copy()
    apply_masks(masked, MASKS)
    np.testing.assert_array_equal(masked, by_the_formula(values, MASKS))
    apply_masks(masked, (mask.inverse() for mask in MASKS))
    np.testing.assert_array_equal(masked, values)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_slices_make_up_the_whole(length: int) -> None:
    values = vector(length)
    before = values.copy()
    slices = list(masked_slices(values, MASKS))
    np.testing.assert_array_equal(values, before)
    assert [start for start, _ in slices] == list(range(0, length, SLICE_WORDS))
    parts = [part for _, part in slices] or [np.empty(0, np.uint32)]
    np.testing.assert_array_equal(np.concatenate(parts), by_the_formula(values, MASKS))


@pytest.mark.parametrize("start", [1, 15, 16, 1000, SLICE_WORDS + 3])
def test_any_stretch_can_be_masked_by_itself(start: int) -> None:
    whole = vector(2 * SLICE_WORDS + 50)
    expected = by_the_formula(whole, MASKS)
    part = whole[start : start + SLICE_WORDS + 9].copy()
    apply_masks(part, MASKS, start)
    np.testing.assert_array_equal(part, expected[start : start + SLICE_WORDS + 9])


def test_no_masks_change_nothing() -> None:
    values = vector(100)
    before = values.copy()
    apply_masks(values, ())
    remove_masks(values, ())
    np.testing.assert_array_equal(values, before)


@pytest.fixture(scope="module", params=["threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made: Executor = (
        ThreadPoolExecutor(2)
        if request.param == "threads"
        else ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    )
    with made:
        yield made


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_several_cores_give_the_bits_of_one(
    executor: Executor, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "PARALLEL_WORDS", 0)
    for length in (1, SLICE_WORDS, 5 * SLICE_WORDS + 123):
        values = vector(length)
        expected = by_the_formula(values, MASKS)
        remove_masks(values, MASKS, lambda: executor, workers)
        np.testing.assert_array_equal(values, expected)


def test_a_small_sum_is_not_worth_other_processes() -> None:
    def unused() -> Executor:
        raise AssertionError("work was given away")

    values = vector(1000)
    expected = by_the_formula(values, MASKS)
    remove_masks(values, MASKS, unused, 2)
    np.testing.assert_array_equal(values, expected)


def test_a_reader_continues_where_it_was() -> None:
    stream = Keystream(derive_key(b"k" * 32, purpose="test"))
    reader = stream.reader(37, 500)
    read = bytearray(2000)
    view = memoryview(read)
    for begin, end in ((0, 4), (4, 400), (400, 404), (404, 2000)):
        reader.fill(view[begin:end])
    np.testing.assert_array_equal(np.frombuffer(read, "<u4"), stream.words(37, 500))


def test_a_reader_ends_where_the_stream_does() -> None:
    with pytest.raises(ValueError, match="256 GiB"):
        Keystream(bytes(32)).reader(2**36 - 1, 2)
