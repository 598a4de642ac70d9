"""The manifest takes what is consistent, in one byte form, and refuses everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models import zoo
from models.manifest import MAX_MANIFEST_BYTES, InvalidManifest, ModelManifest, describe
from models.weights import InvalidWeights, decode_weights, encode_weights


@pytest.fixture(scope="module")
def watch() -> ModelManifest:
    return zoo.load("watch").manifest


def canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def test_bytes_round_trip(watch: ModelManifest) -> None:
    data = watch.to_bytes()
    assert ModelManifest.from_bytes(data) == watch
    assert ModelManifest.from_bytes(data).sha256() == watch.sha256()
    assert data == canonical(json.loads(data))


def test_next_version_keeps_the_graph_and_takes_new_weights(watch: ModelManifest) -> None:
    weights = encode_weights(np.full(watch.parameter_count, 0.5, np.float32))
    after = watch.next_version(weights)
    assert (after.version, after.graph, after.weights) == (2, watch.graph, describe(weights))
    assert after.parameters == watch.parameters
    assert ModelManifest.from_bytes(after.to_bytes()) == after
    assert after.next_version(weights).version == 3
    with pytest.raises(InvalidManifest, match="bytes"):
        watch.next_version(weights + b"\0")


def test_last_version_has_no_next(watch: ModelManifest) -> None:
    weights = encode_weights(np.zeros(watch.parameter_count, np.float32))
    last = ModelManifest.model_validate(dict(watch) | {"version": 2**31})
    with pytest.raises(InvalidManifest, match="version"):
        last.next_version(weights)


def remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def put(value: object, *path: str | int) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        remove("labels"),
        put(1, "surprise"),
        put(2, "schema_version"),
        put("Watch", "name"),
        put("../watch", "name"),
        put(0, "version"),
        put("1", "version"),
        put(True, "version"),
        put("g" * 64, "graph", "sha256"),
        put(0, "graph", "size"),
        put(2**29, "graph", "size"),
        put(4, "weights", "size"),
        put(3318, "parameter_count"),
        put(0, "train_batch_size"),
        put("hinge", "loss"),
        put("huber", "loss"),
        put("binary_crossentropy", "loss"),
        put([7], "target", "shape"),
        put("float32", "target", "dtype"),
        put("lion", "optimizer", "kind"),
        put(1.0, "optimizer", "beta_1"),
        put(0, "accumulation"),
        put([{"size": 4, "rate": 1.0}], "dropouts"),
        put(0, "input", "vocabulary"),
        put(9, "input", "vocabulary"),
        remove("target"),
        put("float64", "input", "dtype"),
        put([0.0], "input", "mean"),
        put([0.0] * 6, "input", "std"),
        put([-1.0] * 6, "input", "std"),
        put([100, 0], "input", "shape"),
        put(1, "parameters", 0, "offset"),
        put([1, 1], "parameters", 0, "shape"),
        put("exercise/bias", "parameters", 0, "name"),
        put(["a"] * 7, "labels"),
        put(["a"] * 2000, "labels"),
        put(["a\nb", "c"], "labels"),
        put([], "signatures"),
        put("eval", "signatures", 0, "name"),
        put(["x" * 65], "signatures", 0, "inputs"),
    ],
)
def test_refuses(watch: ModelManifest, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(watch.to_bytes())
    change(content)
    with pytest.raises(InvalidManifest):
        ModelManifest.from_bytes(canonical(content))


def test_refuses_other_bytes_of_the_same_content(watch: ModelManifest) -> None:
    data = watch.to_bytes()
    for other in (
        data + b"\n",
        b" " + data,
        json.dumps(json.loads(data)).encode(),
        data.replace(b'"version":1', b'"version":1,"version":1'),
        data.replace(b'"version":1', b'"version":2,"version":1'),
    ):
        with pytest.raises(InvalidManifest):
            ModelManifest.from_bytes(other)


def test_refuses_what_is_too_long_before_it_parses() -> None:
    with pytest.raises(InvalidManifest, match="at most"):
        ModelManifest.from_bytes(b"[" * (MAX_MANIFEST_BYTES + 1))


def test_errors_do_not_repeat_the_input(watch: ModelManifest) -> None:
    content = json.loads(watch.to_bytes())
    content["name"] = "SECRET" * 1000
    with pytest.raises(InvalidManifest) as refused:
        ModelManifest.from_bytes(canonical(content))
    assert "SECRET" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_weights_round_trip(watch: ModelManifest) -> None:
    vector = np.linspace(-1, 1, watch.parameter_count, dtype=np.float32)
    data = encode_weights(vector)
    manifest = watch.next_version(data)
    decoded = decode_weights(data, manifest)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, vector)
    assert data[:4] == np.array(-1, "<f4").tobytes()
    with pytest.raises(ValueError, match="read-only"):
        decoded[0] = 0.0


def test_weights_that_are_not_the_manifests_are_refused(watch: ModelManifest) -> None:
    data = encode_weights(np.zeros(watch.parameter_count, np.float32))
    manifest = watch.next_version(data)
    for wrong in (b"", data[:-4], data + b"\0\0\0\0", data[:-1] + b"\x01"):
        with pytest.raises(InvalidWeights):
            decode_weights(wrong, manifest)
    poisoned = data[:-4] + np.array(np.nan, "<f4").tobytes()
    with pytest.raises(InvalidWeights, match="finite"):
        decode_weights(poisoned, watch.next_version(poisoned))


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros((2, 2), np.float32),
        np.zeros(2, np.float64),
        np.zeros(0, np.float32),
        np.array([0.0, np.inf], np.float32),
    ],
)
def test_encode_refuses_what_is_no_finite_float32_vector(vector: Any) -> None:
    with pytest.raises(InvalidWeights):
        encode_weights(vector)


def test_bundled_models_are_consistent() -> None:
    for name in zoo.NAMES:
        bundled = zoo.load(name)
        manifest = bundled.manifest
        assert (manifest.name, manifest.version) == (name, 1)
        assert bundled.weights.shape == (manifest.parameter_count,)
        assert len(bundled.graph) <= 1.3 * manifest.weights.size + 8192 * len(manifest.parameters)
    with pytest.raises(KeyError):
        zoo.load("nothing")
