"""A model file from the network can crash a child process, and nothing else."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.adapters import model_check
from edge_client.adapters.model_check import MIB, Limits, check_in_child
from edge_client.training import ModelRejected
from models import graph_file, zoo
from models.graph import InvalidGraph
from models.manifest import ModelManifest, describe
from models.weights import encode_weights
from tests.model_mutants import damaged


@pytest.fixture(scope="module")
def watch() -> zoo.BundledModel:
    return zoo.load("watch")


def claimed(model: zoo.BundledModel, graph: bytes) -> ModelManifest:
    """A manifest that vouches for another graph: what a signer that was fooled would sign."""
    return ModelManifest.model_validate(dict(model.manifest) | {"graph": describe(graph)})


@pytest.mark.parametrize("name", zoo.NAMES)
def test_bundled_models_pass_in_a_child(name: str) -> None:
    model = zoo.load(name)
    check_in_child(model.manifest, model.graph, encode_weights(model.weights))


@pytest.mark.parametrize(("death", "words"), [("kill -SEGV $$", "SIGSEGV"), ("exit 7", "exit code 7")])
def test_a_child_that_dies_is_a_reason(
    watch: zoo.BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, words: str
) -> None:
    """Which files kill a runtime differs from one to the next, so the child is a double."""
    double = tmp_path / "python"
    double.write_text(f"#!/bin/sh\ncat > /dev/null\n{death}\n")
    double.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(double))
    with pytest.raises(ModelRejected, match=f"ended its process: {words}"):
        check_in_child(watch.manifest, watch.graph, encode_weights(watch.weights))


def test_a_child_takes_at_most_half_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "_available_bytes", lambda: 200 * MIB)
    assert Limits.of_this_device().memory_bytes == 100 * MIB
    monkeypatch.setattr(model_check, "_available_bytes", lambda: 8000 * MIB)
    assert Limits.of_this_device().memory_bytes == 512 * MIB


def test_limits_are_kept_and_named(watch: zoo.BundledModel) -> None:
    weights = encode_weights(watch.weights)
    oversized = watch.graph + bytes(64 * MIB)
    with pytest.raises(ModelRejected, match="16 MiB"):
        check_in_child(claimed(watch, oversized), oversized, weights, Limits(memory_bytes=16 * MIB))
    with pytest.raises(ModelRejected, match=r"more than 0\.05 s"):
        check_in_child(watch.manifest, watch.graph, weights, Limits(seconds=0.05))


def test_reasons_come_back_from_the_child(watch: zoo.BundledModel) -> None:
    weights = encode_weights(watch.weights)
    cases = {
        "no TensorFlow Lite": b"#!/bin/sh\n" * 10,
        "beyond the end": watch.graph[: len(watch.graph) // 2],
        "train": zoo.load("digits").graph,
    }
    for words, graph in cases.items():
        with pytest.raises(ModelRejected, match=words):
            check_in_child(claimed(watch, graph), graph, weights)
    poison = np.full_like(watch.weights, np.nan).tobytes()
    manifest = ModelManifest.model_validate(dict(watch.manifest) | {"weights": describe(poison)})
    with pytest.raises(ModelRejected, match="finite"):
        check_in_child(manifest, watch.graph, poison)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_five_hundred_damaged_files_of_each_model_crash_at_most_their_child(name: str) -> None:
    """Each in a process of its own. Most are refused before the runtime sees them, which half would kill."""
    found = damaged(name, 500)
    assert found["rejected"] > 400
    crashed = sum(count for how, count in found.items() if how.startswith("SIG"))
    assert crashed < 25


def test_every_truncation_is_refused_without_a_runtime(watch: zoo.BundledModel) -> None:
    for length in range(0, len(watch.graph), 37):
        with pytest.raises(InvalidGraph):
            graph_file.read(watch.graph[:length])


def test_what_a_graph_must_not_have_is_named(watch: zoo.BundledModel) -> None:
    def patched(find: Any, put: Any) -> bytes:
        assert find in watch.graph
        return watch.graph.replace(find, put)

    with pytest.raises(InvalidGraph, match="flatbuffer"):
        graph_file.read(patched(b"TFL3", b"TFL9"))
    root = struct.unpack_from("<I", watch.graph)[0]
    with pytest.raises(InvalidGraph, match="beyond the end"):
        graph_file.read(struct.pack("<I", len(watch.graph)) + watch.graph[4:])
    with pytest.raises(InvalidGraph):
        graph_file.read(watch.graph[:root] + b"\xff" * 4 + watch.graph[root + 4 :])


def test_bundled_graphs_hold_what_their_manifests_say() -> None:
    for name in zoo.NAMES:
        model = zoo.load(name)
        graph = graph_file.read(model.graph)
        assert set(graph.signatures) == {signature.name for signature in model.manifest.signatures}
        assert graph.constant_bytes < 8192
        assert {"CONV_2D", "ASSIGN_VARIABLE"} <= set(graph.operators)
