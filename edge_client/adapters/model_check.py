"""Try a model file from the network in a process of its own, before the daemon loads it.

The signature on a manifest says who made a model, not that the runtime survives it. So a new version is first
checked, loaded, and run forward and backward by a child with limits on memory and time. A corrupt or hostile
file can crash only the child; the reason is reported, and the device stays on the version that it has.

The child is a new interpreter, not a fork: it shares nothing with the daemon, and takes its memory only while
it runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from edge_client.training import ModelRejected
from models.manifest import InvalidManifest, ModelManifest

MIB = 2**20
MAX_MEMORY = 512 * MIB
REASON_BYTES = 300
_LENGTHS = struct.Struct("<III")
_REJECTED = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What the child may take.

    Attributes:
        memory_bytes: of address space beyond what the idle child has after its imports.
        seconds: of wall-clock time; a Raspberry Pi 3 needs about four for the imports alone.
    """

    memory_bytes: int = MAX_MEMORY
    seconds: float = 60.0

    @classmethod
    def of_this_device(cls) -> Limits:
        """At most half of the memory that is available now, so that the child cannot starve the daemon."""
        return cls(memory_bytes=min(MAX_MEMORY, _available_bytes() // 2))


def check_in_child(
    manifest: ModelManifest, graph: bytes, weights: bytes, limits: Limits | None = None
) -> None:
    """Check, load and run a model in a child process.

    Args:
        manifest: the verified manifest.
        graph: bytes of its graph file.
        weights: bytes of its weights file.
        limits: of the child; by default `Limits.of_this_device`.

    Raises:
        ModelRejected: the model is not what its manifest says, does not run, takes too much memory or time,
            or crashed the child; says which.
        OSError: no child could be started, which says nothing about the model.
    """
    limits = limits or Limits.of_this_device()
    document = manifest.to_bytes()
    command = [sys.executable, "-m", __name__, str(limits.memory_bytes), str(int(limits.seconds) + 1)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with child:
        try:
            content = _LENGTHS.pack(len(document), len(graph), len(weights)) + document + graph + weights
            answer, _ = child.communicate(content, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise ModelRejected(f"trying the model took more than {limits.seconds:g} s") from None
    if child.returncode == 0 and answer == b"ok":
        return
    if child.returncode == _REJECTED:
        raise ModelRejected(answer[:REASON_BYTES].decode("utf-8", "replace"))
    raise ModelRejected(f"trying the model ended its process: {_ending(child.returncode)}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def try_model(manifest: ModelManifest, graph: bytes, weights: bytes) -> None:
    """Check a model file, load it, and run one prediction and a step of every kind of training.

    Raises:
        ModelRejected: it is not what its manifest says, or does not run to finite numbers.
        MemoryError: more was needed than there is.
    """
    import numpy as np

    from edge_client.adapters.tflite import TfliteTrainer
    from edge_client.training import Examples, HiddenExamples, TrainingConfig, TrainingError
    from models import graph_file
    from models.graph import InvalidGraph
    from models.manifest import WRITING_SIGNATURES
    from models.weights import InvalidWeights, decode_weights
    from protocol.dp.example import mechanism_of
    from protocol.dp.parameters import ExamplePrivacy, NoiseDistribution

    try:
        forbidden = sorted(graph_file.read(graph).writers - WRITING_SIGNATURES)
        if forbidden:
            raise ModelRejected(f"the entry point {forbidden[0]} changes variables, which it must not")
        trainer = TfliteTrainer(manifest, graph)
        start = decode_weights(weights, manifest)
        example = np.asarray(manifest.input.mean, np.float32)
        x = np.broadcast_to(example, (2, *manifest.input.shape)).astype(np.float32)
        predicted = trainer.predict(start, x)
        if predicted.shape != (2, len(manifest.labels)) or not np.isfinite(predicted).all():
            raise ModelRejected("a prediction with the new weights is not finite or has a wrong shape")
        y = np.zeros((2, *manifest.target.shape), manifest.target.dtype)
        # So small a rate that the step cannot diverge: what it changes does not matter, that it runs does.
        config = TrainingConfig(local_epochs=1, learning_rate=1e-12)
        trainer.train(start, Examples("trial", x, y), config, np.random.default_rng(0))
        if manifest.example_gradients:
            trial = ExamplePrivacy(clip_norm=1.0, noise_multiplier=64.0, sampling_probability=1.0)
            mechanism = mechanism_of(trial, NoiseDistribution.SKELLAM, manifest.parameter_count)
            hidden = HiddenExamples(mechanism, 1, bytes(32))
            trainer.train(
                start, Examples("trial", x, y), replace(config, hidden=hidden), np.random.default_rng(0)
            )
    except (InvalidGraph, InvalidWeights) as error:
        raise ModelRejected(str(error)) from error
    except ModelRejected:
        raise
    except TrainingError as error:
        raise ModelRejected(f"a step of training failed: {error}") from error


def main() -> int:
    """The child: reads a model from its standard input, and answers with `ok` or a reason."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    # Imported before the limit is set, so that it does not depend on how large the runtime is.
    import models.graph_file
    import models.weights  # noqa: F401
    from edge_client.adapters import tflite  # noqa: F401

    # Should memory run out all the same, the kernel is to take this process and not the daemon.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory,) * 2)
    # Nothing that a model does needs a file or a process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
    try:
        manifest, graph, weights = _received(sys.stdin.buffer)
        try_model(ModelManifest.from_bytes(manifest), graph, weights)
    except (ModelRejected, InvalidManifest) as error:
        return _answer(str(error), _REJECTED)
    except MemoryError:
        return _answer(f"it needs more than {memory // MIB} MiB", _REJECTED)
    except Exception as error:
        # Without memory, runtimes fail in ways of their own.
        return _answer(f"trying it with {memory // MIB} MiB failed: {type(error).__name__}", _REJECTED)
    return _answer("ok", 0)


def _received(stream: BinaryIO) -> tuple[bytes, bytes, bytes]:
    lengths = _LENGTHS.unpack(stream.read(_LENGTHS.size))
    first, second, third = (stream.read(length) for length in lengths)
    return first, second, third


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _available_bytes() -> int:
    """Memory that could be had without swapping, as Linux estimates it."""
    words = Path("/proc/meminfo").read_text().split()
    return 1024 * int(words[words.index("MemAvailable:") + 1])


def _answer(text: str, code: int) -> int:
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
    return code


if __name__ == "__main__":
    # Not sys.exit: a runtime that a hostile file has damaged might crash on the way out, after its answer.
    os._exit(main())
