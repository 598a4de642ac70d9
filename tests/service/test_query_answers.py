"""From a noisy mean vector to an answer: exact without noise, and within its interval with it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.queries import QueryRequest
from aggregator.rounds.answer import Answer, HistogramAnswer, NumberAnswer, QuantileAnswer, answer
from aggregator.rounds.planning import check_settings
from aggregator.settings import InvalidSettings
from protocol import ring
from protocol.dp.errors import PrivacyError
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode
from protocol.dp.parameters import PrivacyMode
from protocol.plan import (
    HistogramQuestion,
    MeanQuestion,
    QuantileQuestion,
    QueryTask,
    Question,
    SumQuestion,
)
from protocol.queries import answer_vector

VALUES = np.random.default_rng(7).uniform(-5.0, 95.0, 200)
CLIPPED = np.clip(VALUES, 0.0, 80.0)


def key(*names: object) -> bytes:
    return hashlib.sha256(repr(names).encode()).digest()


def asked(
    question: Question, mode: PrivacyMode = PrivacyMode.NONE, *, seed: int = 0, noise: float | None = None
) -> Answer:
    """The answer of 200 devices through the real mechanism."""
    settings = QueryRequest(
        "battery", 0.0, 80.0, question, cohort=200, privacy=mode, noise_multiplier=noise
    ).resolve()
    assert isinstance(settings.asks, QueryTask)
    encoding = derive_encoding(
        settings.privacy,
        dimension=settings.asks.dimension,
        minimum_survivors=settings.cohort.minimum_survivors,
        maximum_clients=200,
        rotation_seed=bytes(32),
    )
    mean = summed(settings.asks, encoding, VALUES, seed)
    return answer(settings.asks, mean, [len(VALUES)], encoding)


def summed(
    task: QueryTask, encoding: EncodingParameters, values: NDArray[np.float64], seed: int
) -> NDArray[np.float32]:
    total = np.zeros(encoding.length, np.uint32)
    for index, value in enumerate(values):
        vector = encode(answer_vector(task, float(value)), {}, encoding, key("noise", seed, index))
        ring.add(total, vector, encoding.bits, out=total)
    central = key("central", seed) if encoding.privacy.mode is PrivacyMode.CENTRAL else None
    return decode(total, len(values), encoding, noise_key=central)[0]


def number(found: Answer) -> NumberAnswer:
    assert isinstance(found.figures, NumberAnswer)
    return found.figures


def quantile(found: Answer) -> QuantileAnswer:
    assert isinstance(found.figures, QuantileAnswer)
    return found.figures


def test_without_noise_sum_and_mean_are_exact_to_the_resolution_of_the_ring() -> None:
    mean, total = number(asked(MeanQuestion())), number(asked(SumQuestion()))
    assert mean.standard_error < 1e-6 * 80
    assert mean.low <= CLIPPED.mean() <= mean.high and mean.high - mean.low < 1e-4
    assert total.low <= CLIPPED.sum() <= total.high
    assert total.estimate == pytest.approx(200 * mean.estimate)


def test_without_noise_a_histogram_is_the_histogram() -> None:
    figures = asked(HistogramQuestion(bins=16)).figures
    assert isinstance(figures, HistogramAnswer) and figures.standard_error == 0
    counts, edges = np.histogram(CLIPPED, bins=16, range=(0, 80))
    np.testing.assert_allclose(figures.counts, counts, atol=1e-3)
    np.testing.assert_array_equal(figures.edges, edges)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_without_noise_a_quantile_is_right_to_one_bin(q: float) -> None:
    found = quantile(asked(QuantileQuestion(q=q, bins=128)))
    true = float(np.quantile(CLIPPED, q))
    assert found.resolution == 80 / 128
    assert found.low - 1e-9 <= true <= found.high + 1e-9
    assert abs(found.estimate - true) <= 2 * found.resolution
    assert found.high - found.low <= 3 * found.resolution


@pytest.mark.parametrize("mode", [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL, PrivacyMode.LOCAL])
def test_the_interval_holds_the_truth_as_often_as_it_says(mode: PrivacyMode) -> None:
    # 60 runs of an interval that holds in 95 %: fewer than 50 has a probability of 1.2e-4 (binomial), and the
    # seeds are fixed.
    true = CLIPPED.mean()
    found = [number(asked(MeanQuestion(), mode, seed=seed, noise=3.0)) for seed in range(60)]
    assert sum(f.low <= true <= f.high for f in found) >= 50
    errors = np.array([f.estimate - true for f in found]) / found[0].standard_error
    # The standard deviation of 60 normal errors lies within 25 % of 1 but for a probability of 0.7 %.
    assert np.std(errors) == pytest.approx(1.0, abs=0.25)


def test_the_noise_is_what_the_plan_says() -> None:
    found = number(asked(MeanQuestion(), PrivacyMode.DISTRIBUTED, noise=2.0))
    # z times half the bounds over the participants, sized for 134 of them where 200 came.
    assert found.standard_error == pytest.approx(2.0 * 40 / 200 * (200 / 134) ** 0.5, rel=0.01)


def test_quantiles_with_noise_lie_in_their_interval() -> None:
    # 40 intervals that hold in 95 % at least: fewer than 33 has a probability below 7e-4; fixed seeds.
    true = float(np.quantile(CLIPPED, 0.5))
    found = [
        quantile(asked(QuantileQuestion(q=0.5, bins=32), PrivacyMode.DISTRIBUTED, seed=seed, noise=1.0))
        for seed in range(40)
    ]
    assert sum(f.low <= true <= f.high for f in found) >= 33
    assert all(f.low <= f.estimate <= f.high for f in found)
    # A rank is off by 2.8 noisy bins at most, and 6 values lie in a bin of 2.5: useful, not trivial.
    assert np.median([f.high - f.low for f in found]) < 20


def test_counts_add_up_to_the_participants() -> None:
    figures = asked(HistogramQuestion(bins=10), PrivacyMode.CENTRAL, noise=5.0).figures
    assert isinstance(figures, HistogramAnswer)
    assert sum(figures.counts) == pytest.approx(200)
    counts, _ = np.histogram(CLIPPED, bins=10, range=(0, 80))
    off = (np.array(figures.counts) - counts) / figures.standard_error
    assert figures.standard_error == pytest.approx(5.0 * 0.9**0.5, rel=0.02)
    assert np.abs(off).max() < 4


def test_every_sub_cohorts_sum_brings_its_own_central_noise() -> None:
    task = QueryTask(field="x", low=0.0, high=1.0, question=MeanQuestion())
    privacy = QueryRequest("x", 0.0, 1.0, task.question, privacy=PrivacyMode.CENTRAL).resolve().privacy
    encoding = derive_encoding(
        privacy, dimension=1, minimum_survivors=10, maximum_clients=100, rotation_seed=bytes(32)
    )
    mean = np.zeros(1, np.float32)
    one, four = (number(answer(task, mean, sizes, encoding)) for sizes in ([80], [20, 20, 20, 20]))
    assert four.standard_error == pytest.approx(2 * one.standard_error, rel=1e-4)


@pytest.mark.parametrize("participants", [2, 3])
def test_noise_far_above_the_counts_still_gives_an_answer(participants: int) -> None:
    task = QueryTask(field="x", low=0.0, high=1.0, question=QuantileQuestion(q=0.5, bins=4))
    privacy = QueryRequest("x", 0.0, 1.0, task.question, noise_multiplier=1000.0).resolve().privacy
    encoding = derive_encoding(
        privacy, dimension=4, minimum_survivors=2, maximum_clients=3, rotation_seed=bytes(32)
    )
    mean = np.array([-500.0, 300.0, -900.0, 700.0], np.float32)
    found = quantile(answer(task, mean, [participants], encoding))
    assert (found.low, found.high) == (0.0, 1.0) and 0 <= found.estimate <= 1


# --- what an operator asks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"low": 80.0, "high": 0.0}, "not below"),
        ({"low": float("nan")}, "low"),
        ({"high": float("inf")}, "high"),
        ({"field": "No Field"}, "field"),
        ({"cohort": 1}, "size"),
        ({"minimum": 20}, "minimum"),
        ({"privacy": PrivacyMode.NONE, "epsilon": 1.0}, "without noise"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "follows from the other"),
        ({"privacy": PrivacyMode.NONE, "noise_multiplier": 1.0}, "no noise"),
        ({"privacy": PrivacyMode.EXAMPLE}, "one value"),
        ({"noise_multiplier": 0.0}, "above 0"),
        ({"delta": 2.0}, "delta"),
    ],
)
def test_what_makes_no_query_is_refused(changes: dict[str, object], says: str) -> None:
    values = {"field": "battery", "low": 0.0, "high": 80.0, "question": MeanQuestion(), **changes}
    with pytest.raises(InvalidSettings, match=says):
        QueryRequest(**values).resolve()  # type: ignore[arg-type]


def test_an_epsilon_chooses_the_noise() -> None:
    request = QueryRequest("battery", 0.0, 80.0, MeanQuestion(), cohort=50, epsilon=1.0)
    settings = request.resolve()
    assert 3.5 < settings.privacy.noise_multiplier < 4.5
    check_settings(settings, None)
    with pytest.raises(PrivacyError):
        QueryRequest("battery", 0.0, 80.0, MeanQuestion(), cohort=50, epsilon=1e-9).resolve()
