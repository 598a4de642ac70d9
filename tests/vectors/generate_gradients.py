"""Write `gradients-v1.npz`: small graphs, inputs, and TensorFlow's losses and gradients. Needs TensorFlow.

    python -m tests.vectors.generate_gradients

The test that reads it needs no TensorFlow, so it holds every runtime to the same figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.export import export
from models.manifest import InputSpec

layers = tf.keras.layers
FILE = Path(__file__).parent / "gradients-v1.npz"
BATCH = 4
MODELS: dict[str, tuple[tuple[int, ...], Any]] = {
    "convolutions": (
        (7, 8, 2),
        lambda: [
            layers.Conv2D(4, 3, dilation_rate=2, padding="same", activation="relu6"),
            layers.DepthwiseConv2D(3, strides=2, padding="same", activation="swish"),
            layers.Conv2D(4, 2, groups=2, activation="gelu"),
            layers.Flatten(),
        ],
    ),
    "separable": (
        (7, 5, 2),
        lambda: [
            layers.SeparableConv2D(6, 3, padding="same"),
            layers.GroupNormalization(3),
            layers.DepthwiseConv2D((2, 3), dilation_rate=2, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
        ],
    ),
    "pooling": (
        (9, 8, 2),
        lambda: [
            layers.Conv2D(3, 2, strides=2, activation="elu"),
            layers.MaxPooling2D(3, 2, padding="same"),
            layers.AveragePooling2D(2, 1, padding="same"),
            layers.GlobalAveragePooling2D(),
        ],
    ),
    "normalisation": (
        (6, 4),
        lambda: [
            layers.Conv1D(4, 2),
            layers.GroupNormalization(2),
            layers.LeakyReLU(0.1),
            layers.LayerNormalization(),
            layers.GlobalMaxPooling1D(),
        ],
    ),
    "recurrence": ((4, 3), lambda: [layers.LSTM(3, return_sequences=True), layers.GRU(3)]),
    "words": ((5,), lambda: [layers.Embedding(7, 3), layers.GlobalAveragePooling1D()]),
}


def main() -> None:
    arrays: dict[str, Any] = {}
    for name, (shape, parts) in MODELS.items():
        tf.keras.backend.clear_session()
        tf.keras.utils.set_random_seed(5)
        model = tf.keras.Sequential([layers.Input(shape), *parts(), layers.Dense(3)])
        plain = InputSpec(shape=shape, mean=(0.0,) * shape[-1], std=(1.0,) * shape[-1])
        made = export(model, name=name, labels=["a", "b", "c"], scaling=plain, train_batch_size=BATCH)
        random = np.random.default_rng(6)
        ids = made.manifest.input.vocabulary
        x = random.integers(0, ids, (BATCH, *shape)) if ids else random.normal(size=(BATCH, *shape))
        x, y = x.astype(np.float32), random.integers(0, 3, BATCH).astype(np.int32)
        mask = np.array([1.0, 0.5, 2.0, 0.0], np.float32)
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(x))
            loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
        gradients = tape.gradient(loss, model.trainable_variables)
        flat = np.concatenate([tf.convert_to_tensor(part).numpy().ravel() for part in gradients])
        arrays |= {
            f"{name}/graph": np.frombuffer(made.graph, np.uint8),
            f"{name}/weights": made.weights,
            f"{name}/x": x,
            f"{name}/y": y,
            f"{name}/mask": mask,
            f"{name}/loss": np.float32(loss),
            f"{name}/gradient": flat.astype(np.float32),
        }
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
