"""Graphs for prediction alone: every kind of layer in every precision, and small."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from models import graph_file, inference
from models.inference import PRECISIONS, convert
from models.network import Network

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers
LOSSES = {"float32": 1e-5, "float16": 2e-3, "int8": 0.1}
"""Largest error of an output, relative to the largest output."""


def recurrent() -> Any:
    parts = [layers.LSTM(6, return_sequences=True), layers.GRU(5), layers.Dense(3)]
    return tf.keras.Sequential([layers.Input((8, 4)), *parts])


def attentive() -> Any:
    inputs = tf.keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4)(*[layers.LayerNormalization()(inputs)] * 2)
    x = layers.Dense(8, activation="gelu")(layers.Add()([inputs, layers.Dropout(0.1)(y)]))
    return tf.keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def convolving() -> Any:
    inputs = tf.keras.Input((12, 12, 4))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, trainable=False)(inputs)
    x = layers.BatchNormalization(trainable=False)(x)
    x = layers.ReLU(6.0)(layers.GroupNormalization(2)(layers.SeparableConv2D(8, 3, padding="same")(x)))
    gate = layers.Dense(8, activation="sigmoid")(layers.GlobalMaxPooling2D(keepdims=True)(x))
    x = layers.MaxPooling2D(2)(layers.Multiply()([x, gate]))
    return tf.keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


@pytest.mark.parametrize("build", [recurrent, attentive, convolving])
def test_every_precision_predicts_as_keras_does_and_is_a_file_that_devices_take(build: Any) -> None:
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(2)
    model = build()
    network = Network(model)
    x = np.random.default_rng(0).normal(size=(67, *network.example_shape)).astype(np.float32)
    expected = model(x).numpy()
    for precision in PRECISIONS:
        graph = convert(network, network.flat_weights(), precision, x)
        graph_file.read(graph)
        interpreter = tf.lite.Interpreter(model_content=graph, num_threads=1)
        assert interpreter.get_input_details()[0]["name"] == "x"
        # The last batch is not full.
        error = np.abs(inference._run(graph, x) - expected).max() / np.abs(expected).max()
        assert error <= LOSSES[precision], precision
        assert len(graph) <= 1.3 * 4 * model.count_params() + 8192 * network.layer_count


def test_the_8_bit_form_has_ranges_and_weights_of_8_bits() -> None:
    tf.keras.backend.clear_session()
    model = tf.keras.Sequential([layers.Input((300,)), layers.Dense(200, activation="relu"), layers.Dense(3)])
    network = Network(model)
    x = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    sizes = [len(convert(network, network.flat_weights(), precision, x)) for precision in PRECISIONS]
    count = network.parameter_count
    for size, width in zip(sizes, (4, 2, 1), strict=True):
        assert width * count <= size <= width * count + 8192
