"""Try many damaged model files, each in a process of its own: `tests/model_mutants.py MODEL COUNT SEED`.

MODEL is a bundled one, or a directory with an exported one. With `--no-reader` behind it all, the runtime
sees every file: what a device without the reader would meet.
Prints one line of JSON: how many files ended how. Every file gets a fork of this process, in which the
runtime is already loaded, with limits on memory and time; nothing is left for the next one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from edge_client.adapters import tflite  # noqa: F401  before the forks
from edge_client.adapters.model_check import MIB, try_model
from edge_client.training import ModelRejected
from models import graph_file, zoo
from models.graph import Graph
from models.manifest import ModelManifest, describe
from models.weights import encode_weights

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000)


def mutated(graph: bytes, random: np.random.Generator) -> bytes:
    """A graph with one kind of damage."""
    data = bytearray(graph)
    at = int(random.integers(8, len(data) - 8))
    kind = int(random.integers(6))
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        for place in random.integers(0, len(data), 16):
            data[place] = int(random.integers(256))
    elif kind == 2:
        at -= at % 4
        data[at : at + 4] = struct.pack("<I", EXTREMES[int(random.integers(len(EXTREMES)))])
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + int(random.integers(1, 64))]
    else:
        source = int(random.integers(8, len(data) - 8))
        data[at : at + 8] = data[source : source + 8]
    return bytes(data)


def outcome(manifest: ModelManifest, graph: bytes, weights: bytes, *, reader: bool) -> str:
    """How one file ends in a child."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + 256 * MIB,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 1
        try:
            if not reader:
                graph_file.read = lambda data: Graph((), {}, 0)  # type: ignore[assignment]
            try_model(manifest, graph, weights)
            code = 0
        except (ModelRejected, MemoryError):
            code = 3
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {0: "ran", 3: "rejected", 1: "error"}.get(code) or signal.Signals(-code).name


def damaged(model: str | Path, count: int) -> dict[str, int]:
    """How many of so many damaged files ended how; in a process of its own, which forks."""
    run = subprocess.run(
        [sys.executable, "tests/model_mutants.py", str(model), str(count), "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    assert sum(found.values()) == count and not found.get("error", 0)
    return found


def exported(directory: Path) -> zoo.BundledModel:
    """A model as `covey model export` writes it."""
    weights = np.frombuffer((directory / "weights.bin").read_bytes(), "<f4")
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    return zoo.BundledModel(manifest, (directory / "model.tflite").read_bytes(), weights)


def main() -> None:
    name, count, seed, reader = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4:] != ["--no-reader"],
    )
    bundled = zoo.load(name) if name in zoo.NAMES else exported(Path(name))
    random = np.random.default_rng(seed)
    weights = encode_weights(bundled.weights)
    found: Counter[str] = Counter()
    for _ in range(count):
        graph = mutated(bundled.graph, random)
        manifest = ModelManifest.model_validate(dict(bundled.manifest) | {"graph": describe(graph)})
        found[outcome(manifest, graph, weights, reader=reader)] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main()
