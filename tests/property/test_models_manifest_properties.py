"""Whatever a manifest says, its bytes say it once; damaged bytes say nothing."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models import zoo
from models.manifest import InputSpec, InvalidManifest, ModelManifest, ParameterSpec, describe
from models.weights import decode_weights, encode_weights

WATCH = zoo.load("watch").manifest
shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


def layout(sizes: list[tuple[int, ...]]) -> tuple[ParameterSpec, ...]:
    parts, offset = [], 0
    for index, shape in enumerate(sizes):
        parts.append(ParameterSpec(name=f"layer-{index}/kernel", shape=shape, offset=offset))
        offset += math.prod(shape)
    return tuple(parts)


@given(
    sizes=shapes,
    labels=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=64))
    .filter(lambda names: len(names) >= 2)
    .map(lambda names: tuple(dict.fromkeys(names)))
    .filter(lambda names: len(names) >= 2),
    mean=st.floats(-1e6, 1e6),
    std=st.floats(1e-6, 1e6),
)
def test_every_manifest_survives_its_bytes(
    sizes: list[tuple[int, ...]], labels: tuple[str, ...], mean: float, std: float
) -> None:
    parameters = layout(sizes)
    count = sum(part.size for part in parameters)
    vector = np.arange(count, dtype=np.float32)
    weights = encode_weights(vector)
    changes = {
        "parameters": parameters,
        "parameter_count": count,
        "labels": labels,
        "weights": describe(weights),
        "input": InputSpec(shape=(5, 1), mean=(mean,), std=(std,)),
    }
    manifest = ModelManifest.model_validate(dict(WATCH) | changes)
    again = ModelManifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert np.array_equal(decode_weights(weights, again), vector)


@given(st.data())
def test_damaged_bytes_are_refused_or_mean_what_they_say(data: st.DataObject) -> None:
    original = WATCH.to_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        damaged = original[:position]
    else:
        damaged = original[:position] + bytes([data.draw(st.integers(0, 255))]) + original[position + 1 :]
    try:
        parsed = ModelManifest.from_bytes(damaged)
    except InvalidManifest:
        return
    assert parsed.to_bytes() == damaged
