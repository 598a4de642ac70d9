"""The gradients of every primitive are TensorFlow's own, over random shapes.

Without conversion, so that many shapes can be tried; that the converted graph computes the same is proved at
every export (`models.parity`).
"""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")

from models.layers import primitives

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

slow = settings(deadline=None, max_examples=40)
sizes = st.integers(1, 9)
windows = st.tuples(st.integers(1, 4), st.integers(1, 4))
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    random = np.random.default_rng(seed)
    return [tf.constant(random.normal(size=shape).astype(np.float32)) for shape in shapes]


def assert_same(ours: Callable[..., Any], stock: Callable[..., Any], inputs: list[Any], seed: int) -> None:
    """Compare results and gradients for a random output gradient."""
    results = []
    for function in (ours, stock):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        (dy,) = normal(seed + 1, tuple(y.shape))
        results.append([y, *tape.gradient(y, inputs, output_gradients=dy)])
    for mine, theirs in zip(*results, strict=True):
        scale = max(1.0, float(tf.reduce_max(tf.abs(theirs))))
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * scale)


@slow
@given(st.tuples(sizes, sizes, sizes, st.integers(1, 5)), windows, windows, sizes, st.booleans(), seeds)
def test_convolution(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    filters: int,
    same: bool,
    seed: int,
) -> None:
    assume(same or all(size >= k for size, k in zip(shape[1:3], kernel, strict=True)))
    padding = "SAME" if same else "VALID"
    inputs = normal(seed, shape, (*kernel, shape[3], filters))
    assert_same(
        lambda x, w: primitives.convolution(x, w, strides, padding),
        lambda x, w: tf.nn.conv2d(x, w, strides, padding),
        inputs,
        seed,
    )


@slow
@given(st.tuples(sizes, sizes, sizes, sizes), windows, st.booleans(), seeds)
def test_pooling(shape: tuple[int, ...], size: tuple[int, int], largest: bool, seed: int) -> None:
    assume(all(length >= window for length, window in zip(shape[1:3], size, strict=True)))
    ours, stock = (
        (primitives.max_pool, tf.nn.max_pool2d) if largest else (primitives.average_pool, tf.nn.avg_pool2d)
    )
    assert_same(lambda x: ours(x, size), lambda x: stock(x, size, size, "VALID"), normal(seed, shape), seed)


@slow
@given(st.tuples(sizes, sizes, sizes, sizes), seeds)
def test_global_pooling(shape: tuple[int, ...], seed: int) -> None:
    inputs = normal(seed, shape)
    assert_same(primitives.global_average, lambda x: tf.reduce_mean(x, [1, 2]), inputs, seed)
    assert_same(primitives.global_max, lambda x: tf.reduce_max(x, [1, 2]), inputs, seed)


@slow
@given(sizes, sizes, sizes, seeds)
def test_dense_and_relu(count: int, inside: int, outside: int, seed: int) -> None:
    inputs = normal(seed, (count, inside), (inside, outside), (outside,))
    assert_same(
        lambda x, w, b: primitives.relu(primitives.add_bias(primitives.matrix_product(x, w), b)),
        lambda x, w, b: tf.nn.relu(tf.matmul(x, w) + b),
        inputs,
        seed,
    )


@slow
@given(sizes, st.integers(2, 9), seeds)
def test_weighted_cross_entropy(count: int, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = tf.constant(random.integers(0, classes, count).astype(np.int32))
    mask = random.uniform(0, 2, count).astype(np.float32)
    mask[random.integers(count) :] = 0.0
    assume(mask.sum() > 0.01)

    def stock(logits: Any) -> Any:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)

    (logits,) = normal(seed, (count, classes))
    assert_same(
        lambda z: primitives.sparse_cross_entropy(z, labels, tf.constant(mask)), stock, [10 * logits], seed
    )


def test_relu_has_no_gradient_at_zero_and_one_just_above() -> None:
    x = tf.constant([-1.0, -0.0, 0.0, 1e-30, 2.0, 1e30])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = primitives.relu(x)
    assert tape.gradient(y, x).numpy().tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_tied_maxima_share_their_gradient() -> None:
    x = tf.constant([[[[2.0], [2.0], [5.0], [1.0]]]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = primitives.max_pool(x, (1, 2))
    assert tf.squeeze(tape.gradient(y, x)).numpy().tolist() == [0.5, 0.5, 1.0, 0.0]
