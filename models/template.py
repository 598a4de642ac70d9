"""The files of a new model project, as `covey model new` writes them."""

from __future__ import annotations

MODEL = '''"""The model: ordinary Keras, and what a device has to know about its input."""

from __future__ import annotations

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec

layers = tf.keras.layers

WINDOW, CHANNELS = 50, 3
LABELS = ("still", "moving")
# Layers whose weights train on each device and never leave it, such as ("label",) for a head of one's own.
# `covey model export model.py:build` takes them from here as well. See docs/explanation/personalisation.md.
LOCAL_LAYERS: tuple[str, ...] = ()


def build() -> tf.keras.Model:
    """From a window of samples to one logit for each label: no softmax, it is part of the loss."""
    return tf.keras.Sequential(
        [
            layers.Input((WINDOW, CHANNELS)),
            layers.Conv1D(8, 5, activation="relu", name="movements"),
            layers.GlobalMaxPooling1D(name="strongest"),
            layers.Dense(len(LABELS), name="label"),
        ]
    )


ARCHITECTURE = Architecture(
    name="@NAME@",
    build=build,
    labels=LABELS,
    local_layers=LOCAL_LAYERS,
    # Constants in the units of your sensor, from its data sheet: never statistics of anybody's data.
    scaling=InputSpec(shape=(WINDOW, CHANNELS), mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS),
)
'''

DATA = '''"""The data adapter: from what your sensor wrote to the examples that a device trains on.

    python data.py RECORDING.csv --label moving --out data/recording.npz

Run it on the device. What it writes stays there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from models.examples import Examples

LABELS = ("still", "moving")
WINDOW = 50


def examples(samples: np.ndarray, label: str) -> Examples:
    """Windows of a recording (t, channels), all with one label; raw units, the manifest scales them."""
    count = len(samples) // WINDOW
    x = samples[: count * WINDOW].reshape(count, WINDOW, -1).astype(np.float32)
    return Examples("device", x, np.full(count, LABELS.index(label), np.int32))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--label", choices=LABELS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    examples(np.loadtxt(options.recording, delimiter=",", ndmin=2), options.label).save(options.out)
'''

PLAN = """#!/bin/sh
# The plan: how the fleet trains the model. Everything here is signed and shown to every device.
set -e
covey model export model.py:ARCHITECTURE --out export
covey model publish export
covey round start --model @NAME@ --rounds 10 --cohort 10 --local-epochs 3 --lr 0.1 --clip-norm 1.0 --watch
"""

TEST = '''"""The model exports with gradients like TensorFlow's, and learns."""

from __future__ import annotations

import numpy as np
from data import WINDOW, examples
from model import ARCHITECTURE

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig


def test_the_model_exports_and_learns() -> None:
    exported = ARCHITECTURE.export()
    trainer = TfliteTrainer(exported.manifest, exported.graph)
    random = np.random.default_rng(0)
    still = examples(0.05 * random.normal(size=(40 * WINDOW, 3)), "still")
    moving = examples(random.normal(size=(40 * WINDOW, 3)), "moving")
    both = Examples.pooled("both", [still, moving])
    update = trainer.train(exported.weights, both, TrainingConfig(10, 0.1), random)
    assert update.accuracy > 0.9
'''

FILES = {"model.py": MODEL, "data.py": DATA, "plan.sh": PLAN, "test_model.py": TEST}


def files(name: str) -> dict[str, str]:
    """File name -> content, for a model of this name."""
    return {path: content.replace("@NAME@", name) for path, content in FILES.items()}
