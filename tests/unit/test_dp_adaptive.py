"""Adaptive clipping: the vote, its noise, and the clip norm's way to the quantile."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from protocol import ring
from protocol.dp.adaptive import CLIP_VOTE, MAX_CLIP_NORM, MIN_CLIP_NORM, next_clip_norm
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode
from protocol.dp.parameters import AdaptiveClipping, MetricSlot, PrivacyMode, PrivacyParameters

LENGTH = 200


def encoding(mode: PrivacyMode, clip_norm: float, z: float, clients: int) -> EncodingParameters:
    privacy = PrivacyParameters(
        mode=mode,
        clip_norm=clip_norm,
        noise_multiplier=z,
        delta=1e-5,
        bits=24,
        adaptive=AdaptiveClipping(),
        metric_slots=(MetricSlot(name="loss", bound=10.0),),
    )
    return derive_encoding(
        privacy,
        dimension=LENGTH,
        minimum_survivors=clients,
        maximum_clients=clients,
        rotation_seed=bytes(32),
    )


def update(norm: float, seed: int) -> NDArray[np.float32]:
    direction = np.random.default_rng(seed).normal(size=LENGTH)
    return (direction * norm / np.linalg.norm(direction)).astype(np.float32)


def round_of(
    norms: list[float], params: EncodingParameters, seed: int
) -> tuple[NDArray[np.float32], dict[str, float]]:
    total = np.zeros(params.length, np.uint32)
    for index, norm in enumerate(norms):
        key = (1000 * seed + index).to_bytes(32, "big")
        ring.add(total, encode(update(norm, index), {"loss": 1.0}, params, key), params.bits, out=total)
    return decode(total, len(norms), params)


def test_the_mean_vote_is_the_share_of_updates_within_the_clip_norm() -> None:
    params = encoding(PrivacyMode.NONE, 1.0, 0.0, 10)
    assert params.length == LENGTH + 2
    _, metrics = round_of([0.1] * 7 + [5.0] * 3, params, 0)
    assert metrics.keys() == {"loss", CLIP_VOTE}
    assert metrics[CLIP_VOTE] == pytest.approx(0.4, abs=1e-3)  # (7 - 3) / 10
    assert metrics["loss"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("mode", "z"), [(PrivacyMode.NONE, 0.0), (PrivacyMode.DISTRIBUTED, 0.3)])
@pytest.mark.parametrize("start", [0.05, 40.0])
def test_the_clip_norm_finds_the_median_of_the_norms(mode: PrivacyMode, z: float, start: float) -> None:
    """Norms from 1 to 3; the median is 2, and after e^(0.2 * 0.5) a round from either side C is near it."""
    norms = list(np.linspace(1.0, 3.0, 20))
    clip_norm, path = start, []
    for number in range(60):
        params = encoding(mode, clip_norm, z, len(norms))
        _, metrics = round_of(norms, params, number)
        clip_norm = next_clip_norm(clip_norm, metrics[CLIP_VOTE], AdaptiveClipping())
        path.append(clip_norm)
    assert np.mean(path[-20:]) == pytest.approx(2.0, rel=0.1)


def test_the_noise_is_that_of_the_paper() -> None:
    """Andrew et al. 2021, Theorem 1: noise z_delta on updates and sigma_b on votes together cost z."""
    z, clients = 0.7, 10
    params = encoding(PrivacyMode.DISTRIBUTED, 1.0, z, clients)
    share, slot = params.privacy.adaptive.share, params.privacy.metric_slots[0].share  # type: ignore[union-attr]
    total_noise = math.sqrt(clients * params.local_variance) / params.scale  # per coordinate, in C = 1
    sigma_b = total_noise / (2 * share)
    z_delta = total_noise
    loss = total_noise / slot  # the metric slot shares the budget in the same way
    together = (z_delta**-2 + (2 * sigma_b) ** -2 + loss**-2) ** -0.5
    assert together == pytest.approx(z, rel=1e-2)  # rounding is part of the sensitivity


def test_one_round_moves_the_clip_norm_by_a_bounded_factor() -> None:
    adaptive = AdaptiveClipping(quantile=0.5, learning_rate=0.2)
    assert next_clip_norm(1.0, 0.0, adaptive) == 1.0
    assert next_clip_norm(1.0, 1e9, adaptive) == pytest.approx(math.exp(-0.1), rel=1e-5)
    assert next_clip_norm(1.0, -1e9, adaptive) == pytest.approx(math.exp(0.1), rel=1e-5)
    assert next_clip_norm(MIN_CLIP_NORM, 1.0, adaptive) == MIN_CLIP_NORM
    assert next_clip_norm(MAX_CLIP_NORM, -1.0, adaptive) == MAX_CLIP_NORM


def test_nobody_asks_for_votes_as_a_metric() -> None:
    with pytest.raises(ValidationError, match="adaptive"):
        PrivacyParameters(
            mode=PrivacyMode.NONE,
            clip_norm=1.0,
            noise_multiplier=0.0,
            delta=1e-5,
            bits=16,
            metric_slots=(MetricSlot(name=CLIP_VOTE, bound=1.0),),
        )


def test_the_aggregator_moves_the_clip_norm_between_rounds_and_over_crashes(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    from protocol.identity import SignedDocument
    from protocol.plan import Plan
    from tests.aggregator_bench import Bench
    from tests.toy_rounds import request

    bench = Bench(tmp_path, parameters=LENGTH)
    for name, device in bench.devices.items():
        device.vector = lambda _, params, name=name: encode(  # type: ignore[misc]
            update(8.0, 1),
            {slot.name: 1.0 for slot in params.privacy.metric_slots},
            params,
            name.encode().ljust(32, b"-"),
        )
    campaign = bench.start(request(rounds=3, clip_norm=1.0, adaptive_quantile=0.5))
    bench.run_until(lambda: len(bench.rounds()) >= 2)
    bench.boot()
    views = bench.finish(campaign)

    def clip_norm(view: object) -> float:
        document = SignedDocument.model_validate_json(view.record.plan)  # type: ignore[attr-defined]
        return Plan.from_bytes(document.payload).privacy.clip_norm

    # Everybody is over the clip norm: the noiseless vote moves it by e^0.1 each round.
    assert [clip_norm(view) for view in views] == pytest.approx([1.0, math.exp(0.1), math.exp(0.2)], rel=1e-4)
    assert views[-1].report.metrics[CLIP_VOTE] == pytest.approx(-1.0, abs=1e-2)
    bench.close()
