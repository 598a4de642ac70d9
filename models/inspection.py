"""What is in a model's directory or graph file, for a person to read. Needs TensorFlow only to time it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models import graph_file
from models.manifest import FLOAT32_BYTES, InvalidManifest, ModelManifest, ParameterSpec, describe
from models.weights import decode_weights

STEPS = 20


def describe_graph(graph: bytes) -> Iterator[str]:
    """Lines on a graph file: size, operators, entry points and the memory that each takes.

    Raises:
        InvalidGraph: a device would refuse the file.
    """
    content = graph_file.read(graph)
    yield f"graph       {len(graph):,} bytes, of which constants {content.constant_bytes:,}"
    yield f"operators   {', '.join(content.operators)}"
    for name, number in sorted(content.signatures.items()):
        subgraph = content.subgraphs[number]
        memory = _memory(content.peak_bytes(number))
        yield f"  {name:12} {len(subgraph.operators):5} operators, about {memory} of memory"


def _memory(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"


def check_files(manifest: ModelManifest, graph: bytes, weights: bytes) -> None:
    """Refuse files that the manifest is not about, or that a device would not take.

    Raises:
        InvalidManifest, InvalidGraph, InvalidWeights: which and why.
    """
    graph_file.read(graph)
    if describe(graph) != manifest.graph:
        raise InvalidManifest("manifest.json is about another model.tflite: export the model again")
    decode_weights(weights, manifest)


def describe_manifest(manifest: ModelManifest) -> Iterator[str]:
    """Lines on a manifest: input, target, training and the parameters of each layer."""
    scale = f", ids below {manifest.input.vocabulary}" if manifest.input.vocabulary else ""
    optimizer = manifest.optimizer.kind
    yield f"model       {manifest.name} version {manifest.version}"
    yield f"input       {manifest.input.dtype} {list(manifest.input.shape)}{scale}"
    yield f"predicts    {', '.join(manifest.labels[:12])}{' ...' if len(manifest.labels) > 12 else ''}"
    yield f"training    {manifest.loss}, {optimizer}, batches of {manifest.train_batch_size}" + (
        f", {manifest.accumulation} to a step" if manifest.accumulation > 1 else ""
    )
    count = manifest.parameter_count
    yield f"parameters  {count:,} that train and travel, {count * FLOAT32_BYTES:,} bytes"
    yield from _parameter_lines(manifest.parameters)
    if manifest.local_parameters:
        yield f"local       {manifest.local_count:,} that train and never leave a device"
        yield from _parameter_lines(manifest.local_parameters)


def _parameter_lines(parameters: tuple[ParameterSpec, ...]) -> Iterator[str]:
    for parameter in parameters:
        yield f"  {parameter.name:32} {list(parameter.shape)!s:20} {parameter.size:10,}"


def time_step(manifest: ModelManifest, graph: bytes, weights: bytes) -> float:
    """Seconds that one call of `train` takes here with one thread: the best of `STEPS`, on random inputs."""
    import tensorflow as tf

    from models.inference import set_start

    interpreter = tf.lite.Interpreter(model_content=graph, num_threads=1)
    interpreter.allocate_tensors()
    set_start(interpreter, manifest, np.frombuffer(weights, "<f4"))
    train = interpreter.get_signature_runner("train")
    random = np.random.default_rng(0)
    inputs = {
        name: random.random(tuple(detail["shape"])).astype(detail["dtype"])
        for name, detail in train.get_input_details().items()
    }
    inputs["lr"] = np.array(1e-6, np.float32)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        train(**inputs)
        times.append(time.perf_counter() - start)
    return min(times)


def files_of(path: Path) -> tuple[ModelManifest | None, bytes, bytes | None]:
    """Manifest, graph and weights of a directory, or of a graph file with what lies beside it.

    Raises:
        FileNotFoundError: there is no graph.
        InvalidManifest: the manifest beside it is none.
    """
    graph = path / "model.tflite" if path.is_dir() else path
    if not graph.is_file():
        raise FileNotFoundError(f"{path} has no model.tflite: give the directory of an export")
    manifest, weights = graph.parent / "manifest.json", graph.parent / "weights.bin"
    beside = graph.name == "model.tflite"
    return (
        ModelManifest.from_bytes(manifest.read_bytes()) if beside and manifest.is_file() else None,
        graph.read_bytes(),
        weights.read_bytes() if beside and weights.is_file() else None,
    )
