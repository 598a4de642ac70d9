"""One model's training step in one runtime, in a process of its own that the benchmark asks for repetitions.

    python benchmarks/training_steps.py RUNTIME DIRECTORY THREADS

RUNTIME is `small` (whichever small runtime this Python has), `tensorflow` or `torch`; DIRECTORY holds an
exported model. It prints the runtime's name. Then, for every line that it reads, it prints the seconds that a
step took, and at the end the bytes of its peak memory. `size NAME ...` in place of all that prints what these
installed packages and all that they need take on disk.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], object]
REPETITION_S = 0.05
LEARNING_RATE = 1e-5


def inputs(manifest: dict[str, Any]) -> tuple[Any, Any]:
    """One batch of random examples: the same in every runtime."""
    random = np.random.default_rng(0)
    batch, labels = manifest["train_batch_size"], len(manifest["labels"])
    x = random.standard_normal((batch, *manifest["input"]["shape"]), dtype=np.float32)
    if manifest["target"]["dtype"] == "int32":
        return x, random.integers(0, labels, batch).astype(np.int32)
    return x, random.standard_normal((batch, labels), dtype=np.float32)


def small_step(directory: Path, manifest: dict[str, Any], threads: int) -> tuple[str, Step]:
    """A call of the exported graph, loaded as the device loads it."""
    from edge_client.adapters.tflite import Interpreter, open_interpreter

    graph = (directory / "model.tflite").read_bytes()
    interpreter = open_interpreter(graph, threads)
    weights = np.frombuffer((directory / "weights.bin").read_bytes(), "<f4").astype(np.float32)
    interpreter.get_signature_runner("set_weights")(weights=weights)
    train = interpreter.get_signature_runner("train")
    x, y = inputs(manifest)
    batch: dict[str, Any] = {"x": x, "y": y, "mask": np.ones(len(y), np.float32)}
    batch |= {"lr": np.array(LEARNING_RATE, np.float32), "mu": np.array(0.0, np.float32)}
    if manifest["dropouts"]:
        batch["keep"] = np.ones((len(y), sum(part["size"] for part in manifest["dropouts"])), np.float32)
    return Interpreter.__module__.partition(".")[0].replace("_", "-"), lambda: train(**batch)


def tensorflow_step(directory: Path, manifest: dict[str, Any], threads: int) -> tuple[str, Step]:
    """The Keras model, its gradient and the same optimizer, compiled into one graph."""
    import tensorflow as tf

    from models.architectures import ARCHITECTURES
    from models.losses import stock_losses

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    model = ARCHITECTURES[manifest["name"]].build_seeded()
    adam = manifest["optimizer"]["kind"] == "adam"
    optimizer = (tf.keras.optimizers.Adam if adam else tf.keras.optimizers.SGD)(LEARNING_RATE)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(stock_losses(manifest["loss"], model(x, training=True), y))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    x, y = (tf.constant(part) for part in inputs(manifest))
    return "tensorflow", lambda: step(x, y)


def torch_step(directory: Path, manifest: dict[str, Any], threads: int) -> tuple[str, Step]:
    """The same network, written for PyTorch; images with their channels last, which is faster."""
    import torch
    from training_torch import MODELS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MODELS[manifest["name"]]()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sum(parameter.numel() for parameter in trained) != manifest["parameter_count"]:
        raise SystemExit(f"the network for PyTorch is not the model {manifest['name']}")
    x, y = (torch.from_numpy(part) for part in inputs(manifest))
    x = x.movedim(-1, 1) if x.dim() == 4 else x  # a view: channels last in memory
    y = y.long() if y.dtype == torch.int32 else y
    losses = {"mean_squared_error": torch.nn.MSELoss, "huber": torch.nn.HuberLoss}
    loss = losses.get(manifest["loss"], torch.nn.CrossEntropyLoss)()
    adam = manifest["optimizer"]["kind"] == "adam"
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(trained, LEARNING_RATE)
    if x.dim() == 4:
        model = model.to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(x), y).backward()
        optimizer.step()

    return "torch", step


STEPS = {"small": small_step, "tensorflow": tensorflow_step, "torch": torch_step}


def peak_rss() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def installed_bytes(names: list[str]) -> int:
    """Bytes on disk of packages and, without extras, all that they need."""
    seen: set[str] = set()
    waiting, total = list(names), 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        total += sum(Path(str(file.locate())).stat().st_size for file in package.files or () if _exists(file))
        for need in package.requires or ():
            if "extra ==" not in need:
                waiting.append(re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0])
    return total


def _exists(file: Any) -> bool:
    return Path(str(file.locate())).is_file() and not str(file).endswith(".pyc")


def main() -> None:
    if sys.argv[1] == "size":
        print(installed_bytes(sys.argv[2:]))
        return
    runtime, directory, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    manifest = json.loads((directory / "manifest.json").read_bytes())
    name, step = STEPS[runtime](directory, manifest, threads)
    step()
    start = time.perf_counter()
    step()
    count = max(3, int(REPETITION_S / (time.perf_counter() - start)))
    print(name, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(count):
            step()
        print((time.perf_counter() - start) / count, flush=True)
    print(peak_rss(), flush=True)


if __name__ == "__main__":
    main()
