"""What people could not do: train the models of TensorFlow's own on-device guide in the small runtime.

tensorflow/tensorflow#54244: converted as the guide says, they stop with "FlexReluGrad failed to prepare".
Data: real digits, enlarged to the 28 x 28 pixels that the guide's Fashion-MNIST has.
"""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models.datasets import digits
from models.export import export
from models.flatbuffer import operators
from models.manifest import InputSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers
IMAGE = 28
LABELS = [
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]


def guide_mlp() -> Any:
    """The model of the guide, word for word."""
    return tf.keras.Sequential(
        [
            layers.Flatten(input_shape=(IMAGE, IMAGE), name="flatten"),
            layers.Dense(128, activation="relu", name="dense_1"),
            layers.Dense(10, name="dense_2"),
        ]
    )


def guide_cnn() -> Any:
    """Its usual convolutional form."""
    return tf.keras.Sequential(
        [
            layers.Reshape((IMAGE, IMAGE, 1), input_shape=(IMAGE, IMAGE)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def images(count: int) -> Examples:
    pooled = Examples.pooled("digits", digits.load())
    chosen = np.random.default_rng(0).permutation(len(pooled))[:count]
    large = np.kron(pooled.x[chosen, :, :, 0], np.ones((1, 3, 3), np.float32)) / np.float32(16)
    return Examples("images", np.pad(large, [(0, 0), (2, 2), (2, 2)]).astype(np.float32), pooled.y[chosen])


@pytest.mark.parametrize(("build", "count", "epochs"), [(guide_mlp, 1500, 6), (guide_cnn, 600, 4)])
def test_tensorflow_54244_fashion_mnist_models_train_in_the_small_runtime(
    build: Any, count: int, epochs: int
) -> None:
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(1)
    exported = export(
        build(),
        name="fashion",
        labels=LABELS,
        scaling=InputSpec(shape=(IMAGE, IMAGE), mean=(0.0,) * IMAGE, std=(1.0,) * IMAGE),
        train_batch_size=32,
    )
    assert not [name for name in operators(exported.graph) if "FLEX" in name or "CUSTOM" in name]
    trainer = TfliteTrainer(exported.manifest, exported.graph)
    examples = images(count + 200)
    train = Examples("train", examples.x[:count], examples.y[:count])
    held_out = Examples("held out", examples.x[count:], examples.y[count:])
    config = TrainingConfig(epochs, 0.1)
    update = trainer.train(exported.weights, train, config, np.random.default_rng(0))
    assert trainer.evaluate(exported.weights + update.delta, held_out).accuracy > 0.85


def test_tensorflow_54244_the_stock_recipe_still_needs_flex() -> None:
    """The control: what the guide does is refused by the converter when only builtins are allowed."""
    model = guide_mlp()
    optimizer = 0.1

    @tf.function(
        input_signature=[
            tf.TensorSpec([8, IMAGE, IMAGE], tf.float32),
            tf.TensorSpec([8], tf.int32),
        ],
        autograph=False,
    )
    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(x))
            loss = tf.reduce_mean(losses)
        for variable, gradient in zip(
            model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
        ):
            variable.assign_sub(optimizer * gradient)
        return {"loss": loss}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([train.get_concrete_function()], model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    converter.experimental_enable_resource_variables = True
    with pytest.raises(Exception, match="ReluGrad"):
        converter.convert()
