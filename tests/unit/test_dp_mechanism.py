"""The encoding of a round: choice of figures, early refusals, and noise of the stated size."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from protocol import ring
from protocol.dp.errors import (
    InvalidParameters,
    NoiseKeyError,
    NonFiniteUpdate,
    PrivacyError,
    RingTooNarrow,
    TooFewSurvivors,
    UpdateShapeError,
)
from protocol.dp.events import DPEvent, Mechanism, event_for
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode, noise_sampler
from protocol.dp.parameters import MetricSlot, NoiseDistribution, PrivacyMode, PrivacyParameters
from protocol.dp.rotation import block_size
from protocol.dp.scaling import OVERFLOW_PROBABILITY, overflow_bound

SEED = b"a digest of the plan............"
SLOTS = (MetricSlot(name="loss", bound=10.0), MetricSlot(name="examples", bound=500.0, share=0.2))
METRICS = {"loss": 2.5, "examples": 120.0}


def privacy(mode: str = "distributed", z: float | None = None, **changes: Any) -> PrivacyParameters:
    fields: dict[str, Any] = {
        "mode": PrivacyMode(mode),
        "clip_norm": 0.5,
        "noise_multiplier": (0.0 if mode == "none" else 1.0) if z is None else z,
        "delta": 1e-5,
        "bits": 20,
        "metric_slots": SLOTS,
    }
    return PrivacyParameters(**{**fields, **changes})


def encoding(parameters: PrivacyParameters | None = None, **changes: Any) -> EncodingParameters:
    fields: dict[str, Any] = {
        "dimension": 300,
        "minimum_survivors": 4,
        "maximum_clients": 6,
        "rotation_seed": SEED,
    }
    return derive_encoding(parameters or privacy(), **{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
        {"clip_norm": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 0.0},
        {"mode": PrivacyMode.NONE, "noise_multiplier": 1.0},
        {"bits": 7},
        {"bits": 33},
        {"delta": 0.0},
        {"delta": 1.0},
        {"colluders": -1},
        {"metric_slots": (SLOTS[0], SLOTS[0])},
        {"noise": "skellam"},
        {"bits": 16.0},
        {"surprise": 1},
    ],
)
def test_bad_privacy_parameters_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        privacy(**changes)


@pytest.mark.parametrize(
    "slot",
    [
        {"name": "Loss", "bound": 1.0},
        {"name": "", "bound": 1.0},
        {"name": "loss", "bound": 0.0},
        {"name": "loss", "bound": math.inf},
        {"name": "loss", "bound": 1.0, "share": 0.0},
        {"name": "loss", "bound": 1.0, "share": 1.5},
    ],
)
def test_bad_metric_slots_are_refused(slot: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MetricSlot(**slot)


def test_privacy_parameters_round_trip_through_json() -> None:
    parameters = privacy()
    assert PrivacyParameters.model_validate_json(parameters.model_dump_json()) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"dimension": 0},
        {"minimum_survivors": 0},
        {"minimum_survivors": 7},
        {"rotation_seed": b"short"},
        {"overflow_probability": 0.0},
        {"overflow_probability": 1.0},
    ],
)
def test_figures_that_make_no_round_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameters):
        encoding(**changes)


def test_as_many_colluders_as_survivors_are_refused() -> None:
    with pytest.raises(InvalidParameters):
        encoding(privacy(colluders=4))
    assert encoding(privacy(colluders=3)).local_variance == pytest.approx(
        encoding(privacy(colluders=3)).norm_bound_squared
    )


@pytest.mark.parametrize("mode", ["none", "central", "distributed"])
def test_a_ring_that_would_overflow_is_refused_with_the_width_that_would_do(mode: str) -> None:
    narrow = privacy(mode, bits=8)
    with pytest.raises(RingTooNarrow, match=r"(\d+) bits would do") as refusal:
        encoding(narrow, dimension=50_000, maximum_clients=200)
    wide = int(str(refusal.value).split(" bits would do")[0].split()[-1])
    encoding(privacy(mode, bits=wide), dimension=50_000, maximum_clients=200)


def test_noise_beyond_every_ring_is_refused() -> None:
    with pytest.raises(RingTooNarrow, match="no ring is wide enough"):
        encoding(privacy(z=1e9))


@pytest.mark.parametrize("bits", [10, 12, 16, 20, 32])
@pytest.mark.parametrize("mode", ["none", "central", "distributed"])
@pytest.mark.parametrize("rotation", [True, False])
def test_chosen_figures_hang_together(mode: str, bits: int, rotation: bool) -> None:
    params = encoding(privacy(mode, bits=bits, rotation=rotation), dimension=40, maximum_clients=5)
    assert params.scale * params.total_clip_norm == pytest.approx(params.radius)
    assert params.total_clip_norm == pytest.approx(0.5 * math.sqrt(1 + 0.1**2 + 0.2**2))
    assert params.norm_bound_squared >= params.radius**2
    assert params.overflow_probability <= OVERFLOW_PROBABILITY
    if mode == "none":
        assert params.overflow_probability == 0
        assert ring.cannot_overflow(5, params.radius, bits)
        assert not ring.cannot_overflow(5, params.radius + 1, bits) or params.radius == 2**22
        assert params.local_variance == params.central_variance == 0
    elif mode == "central":
        assert params.central_variance == params.norm_bound_squared
        assert params.local_variance == 0
    else:
        assert 4 * params.local_variance == pytest.approx(params.norm_bound_squared)
        assert params.central_variance == 0


def test_the_overflow_bound_is_above_what_simulation_finds() -> None:
    """A loose target makes overflow observable: five agreeing clients, the worst case for the signal.

    400 rounds; the bound on a round's probability is 0.2, and a binomial(400, 0.2) exceeds 130 with
    probability below 10^-8.
    """
    parameters = privacy(bits=10, metric_slots=())
    params = encoding(parameters, dimension=256, minimum_survivors=5, maximum_clients=5,
                      overflow_probability=0.2)  # fmt: skip
    assert 0.05 < params.overflow_probability <= 0.2
    assert params.overflow_probability == overflow_bound(params)
    rng = np.random.default_rng(3)
    scaled = np.zeros(256)
    scaled[0] = params.radius
    overflows = 0
    for _ in range(400):
        signs = rng.choice([-1.0, 1.0], size=256)
        signal = 5 * params.radius * signs / math.sqrt(block_size(256))
        noise = rng.normal(0, math.sqrt(5 * params.local_variance), 256)
        overflows += bool(np.any(np.abs(signal + noise) >= 2**9))
    assert overflows <= 130


@pytest.mark.parametrize("noise", list(NoiseDistribution))
@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_the_released_noise_has_the_planned_size(mode: str, noise: NoiseDistribution) -> None:
    """Variance of 40,000 released coordinates of zero updates, within 5 standard errors of a chi-squared
    variable: a false-alarm rate of 10^-6."""
    count = 40_000
    params = encoding(privacy(mode, noise=noise, metric_slots=(), rotation=False), dimension=count)
    total = np.zeros(count, np.uint32)
    for client in range(4):
        vector = encode(np.zeros(count, np.float32), {}, params, bytes([client]) * 32)
        ring.add(total, vector, params.bits, out=total)
    mean, _ = decode(total, 4, params, noise_key=bytes(32) if mode == "central" else None)
    steps = mean.astype(np.float64) * 4 * params.scale
    np.testing.assert_allclose(steps, np.round(steps), atol=0.05)
    statistic = float(np.sum(steps**2)) / (params.privacy.noise_multiplier**2 * params.norm_bound_squared)
    assert abs(statistic - count) < 5 * math.sqrt(2 * count)


def test_each_client_draws_its_own_noise_and_rounding() -> None:
    params = encoding()
    update = np.full(300, 0.01, np.float32)
    first, again, other = (encode(update, METRICS, params, key) for key in (b"a" * 32, b"a" * 32, b"b" * 32))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.99


def test_the_update_is_not_changed() -> None:
    update = np.full(300, 7.0, np.float32)
    encode(update, METRICS, encoding(), bytes(32))
    assert np.all(update == 7.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_refused(bad: float) -> None:
    update = np.zeros(300, np.float32)
    with pytest.raises(NonFiniteUpdate):
        encode(update, {**METRICS, "loss": bad}, encoding(), bytes(32))
    update[17] = bad
    with pytest.raises(NonFiniteUpdate):
        encode(update, METRICS, encoding(), bytes(32))


@pytest.mark.parametrize(
    ("update", "metrics"),
    [
        (np.zeros(299, np.float32), METRICS),
        (np.zeros(300, np.float64), METRICS),
        (np.zeros((300, 1), np.float32), METRICS),
        (np.zeros(300, np.float32), {}),
        (np.zeros(300, np.float32), {**METRICS, "more": 1.0}),
    ],
)
def test_input_of_another_shape_is_refused(update: np.ndarray, metrics: dict[str, float]) -> None:
    with pytest.raises(UpdateShapeError):
        encode(update, metrics, encoding(), bytes(32))


def test_sums_that_must_not_be_decoded_are_refused() -> None:
    params = encoding()
    total = np.zeros(params.length, np.uint32)
    with pytest.raises(TooFewSurvivors):
        decode(total, 3, params)
    with pytest.raises(UpdateShapeError):
        decode(total, 7, params)
    with pytest.raises(UpdateShapeError):
        decode(total[1:], 4, params)
    with pytest.raises(ring.RingElementError):
        decode(total + np.uint32(2**20), 4, params)
    with pytest.raises(NoiseKeyError):
        decode(total, 4, params, noise_key=bytes(32))
    with pytest.raises(NoiseKeyError):
        decode(total, 4, encoding(privacy("central")))


def test_a_round_without_noise_has_no_sampler() -> None:
    with pytest.raises(InvalidParameters):
        noise_sampler(encoding(privacy("none")))


@pytest.mark.parametrize("noise", list(NoiseDistribution))
def test_an_event_says_what_happened(noise: NoiseDistribution) -> None:
    params = encoding(privacy(noise=noise, colluders=1))
    event = event_for(params, 6)
    assert event.mechanism == noise.value
    assert event.shares == 5
    assert event.variance == pytest.approx(5 / 3 * params.norm_bound_squared)
    assert event.dimension == 302
    assert 0 < event.sampler_distance < 2**-60
    assert DPEvent.model_validate_json(event.model_dump_json()) == event
    with pytest.raises(TooFewSurvivors):
        event_for(params, 3)


def test_events_of_the_other_modes() -> None:
    central = event_for(encoding(privacy("central", colluders=1)), 6)
    assert central.shares == 1
    assert central.variance == central.sensitivity_squared
    none = event_for(encoding(privacy("none")), 6)
    assert none.mechanism is Mechanism.NONE
    assert none.variance == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": Mechanism.NONE},
        {"variance_per_share": 0.0},
        {"sensitivity_squared": 0},
        {"colluders": 6},
        {"noise_multiplier": math.nan},
        {"unit": "example"},
        {"v": 2},
    ],
)
def test_events_that_contradict_themselves_are_refused(changes: dict[str, Any]) -> None:
    event = event_for(encoding(), 6)
    with pytest.raises(ValidationError):
        DPEvent(**{**event.model_dump(), **changes})


@pytest.mark.parametrize(
    "figures", [{"clip_norm": 1e300}, {"clip_norm": 1e-300}, {"noise_multiplier": 1e300}]
)
def test_figures_beyond_floats_are_refused_with_the_plan(figures: dict[str, float]) -> None:
    """Their squares are infinite: a device would stumble in place of refusing."""
    with pytest.raises(ValidationError):
        privacy(**figures)


@pytest.mark.parametrize("clip_norm", [1e-12, 1e12])
@pytest.mark.parametrize("noise", [1e-12, 1e12])
def test_the_most_extreme_figures_of_a_plan_end_in_a_typed_answer(clip_norm: float, noise: float) -> None:
    with contextlib.suppress(PrivacyError):
        derive_encoding(
            privacy(clip_norm=clip_norm, noise_multiplier=noise),
            dimension=1000,
            minimum_survivors=7,
            maximum_clients=16_384,
            rotation_seed=bytes(32),
        )
