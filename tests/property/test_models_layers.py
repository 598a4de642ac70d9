"""The gradients of every layer are TensorFlow's own, over random shapes and options.

Without conversion, so that many shapes can be tried; that the converted graph computes the same is proved at
every export (`models.parity`).
"""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")

from models.layers import nonlinear, primitives, shape, windowed
from models.losses import LOSSES, stock_losses
from models.network import Network
from models.parity import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers
slow = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
small = st.integers(1, 4)
sizes = st.integers(1, 9)
pairs = st.tuples(small, small)
seeds = st.integers(0, 2**32 - 1)
paddings = st.sampled_from(["same", "valid"])


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    random = np.random.default_rng(seed)
    return [tf.constant(random.normal(size=shape).astype(np.float32)) for shape in shapes]


def assert_close(mine: Any, theirs: Any) -> None:
    """Equal up to the tolerance, relative to the largest entry; all data are about 1."""
    mine, theirs = tf.convert_to_tensor(mine), tf.convert_to_tensor(theirs)
    assert mine.shape == theirs.shape
    size = max(float(tf.reduce_max(tf.abs(theirs))), 0.1)
    np.testing.assert_allclose(mine / size, theirs / size, atol=TOLERANCE, rtol=0)


def check(build: Callable[[Any], Any], shape: tuple[int, ...], seed: int, count: int = 3) -> None:
    """Outputs, and gradients by parameters and (behind a first product) by inputs, are those of Keras."""
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(seed % 2**32)
    inputs = tf.keras.Input(shape)
    # A product before it, so that the gradient by the input matters too.
    x = layers.Dense(shape[-1], name="before")(inputs)
    model = tf.keras.Model(inputs, layers.Dense(2, name="after")(layers.Flatten(name="flat")(build(x))))
    for variable in model.weights:
        values = normal(seed + 2, tuple(variable.shape))[0]
        variable.assign(tf.abs(values) + 0.5 if "variance" in variable.name else values)
    network = Network(model)
    (batch,) = normal(seed, (count, *shape))
    values = network.split(tf.constant(network.flat_weights()))
    with tf.GradientTape() as tape:
        tape.watch(values)
        ours = network.forward(values, batch)
    (dy,) = normal(seed + 1, tuple(ours.shape))
    gradients = tape.gradient(ours, values, output_gradients=dy)
    with tf.GradientTape() as tape:
        theirs = model(batch)
    assert_close(ours, theirs)
    stock = tape.gradient(theirs, network.variables, output_gradients=dy)
    for mine, expected in zip(gradients, stock, strict=True):
        assert_close(mine, expected)


@slow
@given(st.tuples(sizes, sizes, small), pairs, pairs, st.integers(1, 3), st.booleans(), paddings, seeds)
@example((4, 3, 2), (1, 1), (1, 1), 3, False, "valid", 0)  # a product of matrices
@example((4, 3, 2), (1, 1), (2, 1), 3, False, "same", 0)
def test_convolution(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    moves: tuple[int, int],
    filters: int,
    dilated: bool,
    padding: str,
    seed: int,
) -> None:
    strides, dilation = ((1, 1), moves) if dilated else (moves, (1, 1))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    assume(padding == "same" or all(s >= r for s, r in zip(shape, reach, strict=False)))
    # TensorFlow's own dilated convolution does not take every kernel of one entry.
    options = {"strides": strides, "dilation_rate": dilation, "padding": padding}
    check(layers.Conv2D(filters, kernel, activation="relu", **options), shape, seed)


@slow
@given(st.tuples(sizes, sizes), pairs, pairs, st.integers(2, 4), small, small, paddings, seeds)
def test_convolution_in_groups(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    groups: int,
    inputs: int,
    filters: int,
    padding: str,
    seed: int,
) -> None:
    assume(padding == "same" or all(s >= k for s, k in zip(size, kernel, strict=True)))
    layer = layers.Conv2D(groups * filters, kernel, strides, padding, groups=groups)
    check(layer, (*size, groups * inputs), seed)


@slow
@given(sizes, small, small, st.integers(1, 3), st.booleans(), paddings, seeds)
def test_convolution_along_one_axis(
    length: int, kernel: int, move: int, groups: int, dilated: bool, padding: str, seed: int
) -> None:
    stride, dilation = (1, move) if dilated else (move, 1)
    assume(padding == "same" or length >= (kernel - 1) * dilation + 1)
    # Keras's grouped convolution has no gradient on a CPU where it is dilated.
    groups = 1 if dilated else groups
    options = {"strides": stride, "dilation_rate": dilation, "padding": padding}
    check(layers.Conv1D(2 * groups, kernel, activation="tanh", **options), (length, 3), seed)
    check(layers.DepthwiseConv1D(kernel, **options), (length, 3), seed)
    check(layers.SeparableConv1D(4, kernel, **options), (length, 3), seed)


@slow
@given(st.tuples(sizes, sizes), pairs, small, small, st.booleans(), paddings, seeds)
def test_depthwise_convolution(
    size: tuple[int, int],
    kernel: tuple[int, int],
    move: int,
    multiplier: int,
    dilated: bool,
    padding: str,
    seed: int,
) -> None:
    stride, dilation = (1, move) if dilated else (move, 1)
    assume(padding == "same" or all(s >= (k - 1) * dilation + 1 for s, k in zip(size, kernel, strict=True)))
    options = {"strides": stride, "dilation_rate": dilation, "padding": padding}
    layer = layers.DepthwiseConv2D(kernel, depth_multiplier=multiplier, activation="relu6", **options)
    check(layer, (*size, 2), seed)
    check(layers.SeparableConv2D(3, kernel, depth_multiplier=multiplier, **options), (*size, 2), seed)


@slow
@given(st.tuples(sizes, sizes, small), pairs, pairs, paddings, seeds)
@example((1, 1, 1), (1, 4), (1, 1), "same", 0)  # a window larger than the image
def test_pooling(
    shape: tuple[int, ...], size: tuple[int, int], strides: tuple[int, int], padding: str, seed: int
) -> None:
    assume(padding == "same" or all(s >= k for s, k in zip(shape, size, strict=False)))
    for kind in (layers.MaxPooling2D, layers.AveragePooling2D):
        check(kind(size, strides, padding), shape, seed)
        check(kind(size), shape, seed) if padding == "valid" else None
    for kind in (layers.MaxPooling1D, layers.AveragePooling1D):
        check(kind(size[1], strides[1], padding), shape[1:], seed)


@slow
@given(st.tuples(sizes, sizes, small), st.booleans(), seeds)
def test_global_pooling(shape: tuple[int, ...], keepdims: bool, seed: int) -> None:
    check(layers.GlobalAveragePooling2D(keepdims=keepdims), shape, seed)
    check(layers.GlobalMaxPooling2D(keepdims=keepdims), shape, seed)
    check(layers.GlobalAveragePooling1D(keepdims=keepdims), shape[1:], seed)
    check(layers.GlobalMaxPooling1D(keepdims=keepdims), shape[1:], seed)


@slow
@given(st.sampled_from(sorted(nonlinear.ACTIVATIONS)), st.tuples(small, sizes), seeds)
def test_dense_with_every_activation(name: str, shape: tuple[int, ...], seed: int) -> None:
    function = getattr(tf.nn, name, None) if name in {"relu6", "leaky_relu", "silu"} else name
    check(layers.Dense(5, activation=function), shape, seed)
    check(layers.Activation(function), shape[1:], seed)


@slow
@given(sizes, st.floats(0.05, 0.9), st.floats(0.1, 8.0), seeds)
def test_rectifiers_with_options(width: int, slope: float, cap: float, seed: int) -> None:
    rectifiers = (
        layers.ReLU(),
        layers.ReLU(max_value=cap),
        layers.ReLU(negative_slope=slope),
        layers.LeakyReLU(slope),
        layers.ELU(),
        layers.Softmax(),
    )
    for layer in rectifiers:
        check(layer, (width,), seed)


@slow
@given(st.tuples(small, small), small, st.integers(1, 3), st.booleans(), seeds)
def test_normalisation(size: tuple[int, int], groups: int, each: int, plain: bool, seed: int) -> None:
    shape = (*size, groups * each)
    options = {"center": not plain, "scale": not plain}
    # Of a group of one or two entries only signs and rounding errors are left, ours or theirs.
    assume(size[0] * size[1] * each > 3)
    check(layers.GroupNormalization(groups, **options), shape, seed)
    check(layers.GroupNormalization(groups, **options), (size[0] * size[1], shape[-1]), seed)
    if size[0] * size[1] > 3:
        check(layers.GroupNormalization(-1, **options), shape, seed)
    check(layers.LayerNormalization(**options), (*size, 4), seed)
    check(layers.BatchNormalization(trainable=False, **options), shape, seed)


@slow
@given(st.tuples(sizes, sizes, small), st.tuples(pairs, pairs), seeds)
def test_rearrangements(shape: tuple[int, ...], padding: Any, seed: int) -> None:
    check(layers.ZeroPadding2D(padding), shape, seed)
    check(layers.ZeroPadding1D(padding[0]), shape[1:], seed)
    check(layers.Permute((2, 3, 1)), shape, seed)
    check(layers.Reshape((shape[2], shape[0] * shape[1])), shape, seed)
    check(layers.Rescaling(0.5, -1.0), shape, seed)


@slow
@given(st.tuples(sizes, small), seeds)
def test_branches(shape: tuple[int, ...], seed: int) -> None:
    def residual(x: Any) -> Any:
        y = layers.Dense(shape[-1], activation="relu", name="twice")
        z = layers.Add()([x, y(y(x))])
        gate = layers.Dense(shape[-1], activation="sigmoid")(layers.GlobalAveragePooling1D(keepdims=True)(z))
        return layers.Concatenate()([layers.Multiply()([z, gate]), x])

    check(residual, shape, seed)


@slow
@given(st.integers(2, 5), small, small, st.booleans(), st.booleans(), seeds)
def test_recurrence(length: int, width: int, units: int, sequences: bool, bias: bool, seed: int) -> None:
    for kind in (layers.GRU, layers.LSTM):
        check(kind(units, return_sequences=sequences, use_bias=bias), (length, width), seed)


@slow
@given(small, small, small, small, seeds)
def test_attention(length: int, width: int, heads: int, size: int, seed: int) -> None:
    def attend(x: Any) -> Any:
        return layers.MultiHeadAttention(heads, size)(x, x)

    check(attend, (length, width), seed)


@slow
@given(st.integers(2, 9), small, st.integers(1, 6), seeds)
def test_embedding_adds_up_what_one_id_gets(vocabulary: int, width: int, length: int, seed: int) -> None:
    ids = tf.constant(np.random.default_rng(seed).integers(0, vocabulary, (3, length)).astype(np.int32))
    (table,) = normal(seed, (vocabulary, width))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(table)
        ours, stock = primitives.look_up(ids, table), tf.nn.embedding_lookup(table, ids)
    (dy,) = normal(seed, tuple(stock.shape))
    assert_close(ours, stock)
    expected = tf.convert_to_tensor(tape.gradient(stock, table, output_gradients=dy))
    assert_close(tape.gradient(ours, table, output_gradients=dy), expected)


def test_frozen_layers_are_constants_and_gradients_pass_through_them() -> None:
    def build(x: Any) -> Any:
        x = layers.Conv2D(3, 2, activation="relu")(x)
        x = layers.DepthwiseConv2D(2, padding="same", trainable=False)(x)
        x = layers.BatchNormalization(trainable=False)(x)
        inner = tf.keras.Input(x.shape[1:])
        backbone = tf.keras.Model(inner, layers.Conv2D(2, 1, activation="swish")(inner), name="backbone")
        backbone.trainable = False
        return backbone(x)

    check(build, (5, 6, 2), 7)


def test_relu_has_no_gradient_at_zero_and_one_just_above() -> None:
    x = tf.constant([-1.0, -0.0, 0.0, 1e-30, 2.0, 1e30])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = nonlinear.relu(x)
    assert tape.gradient(y, x).numpy().tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_tied_maxima_share_their_gradient_or_the_first_takes_it() -> None:
    x = tf.constant([[[[2.0], [2.0], [5.0], [1.0]]]])
    for strides, expected in (((1, 2), [0.5, 0.5, 1.0, 0.0]), ((1, 1), [1.0, 0.0, 2.0, 0.0])):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = windowed.max_pool(x, (1, 2), strides)
        assert tf.squeeze(tape.gradient(y, x)).numpy().tolist() == expected


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(LOSSES)), st.integers(1, 9), st.integers(2, 7), st.floats(0.1, 30.0), seeds)
def test_every_loss_is_the_weighted_sum_of_tensorflows(
    name: Any, count: int, labels: int, spread: float, seed: int
) -> None:
    """Also where outputs are large, and where an example is padding and has no share."""
    random = np.random.default_rng(seed)
    width = 1 if name == "binary_crossentropy" else labels
    outputs, real = normal(seed, (count, width), (count, width))
    outputs, real = outputs * spread, real * spread
    whole = tf.constant(random.integers(0, max(width, 2), count).astype(np.int32))
    some = tf.constant(random.integers(0, 2, (count, width)).astype(np.float32))
    truth = {
        "sparse_categorical_crossentropy": whole,
        "binary_crossentropy": whole,
        "multi_label_crossentropy": some,
    }.get(name, real)
    share = random.uniform(0.1, 1.0, count).astype(np.float32)
    share[-1] *= count == 1
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(outputs)
        ours = LOSSES[name](outputs, truth, tf.constant(share))
        stock = tf.reduce_sum(stock_losses(name, outputs, truth) * share)
    assert_close(ours, stock)
    assert_close(tape.gradient(ours, outputs), tape.gradient(stock, outputs))


@slow
@given(st.integers(1, 4), sizes, small, st.floats(0.1, 0.9), seeds)
def test_dropout_multiplies_by_its_mask_alone(
    count: int, length: int, width: int, rate: float, seed: int
) -> None:
    x, dy = normal(seed, (count, length, width), (count, length, width))
    keep = (np.random.default_rng(seed).random((count, length * width)) >= rate) / np.float32(1 - rate)
    mask = tf.constant(keep.astype(np.float32))
    layer = shape.Dropout(layers.Dropout(rate))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer.drop(x, mask)
    expected = tf.reshape(mask, x.shape)
    assert_close(y, x * expected)
    assert_close(tape.gradient(y, x, output_gradients=dy), dy * expected)
