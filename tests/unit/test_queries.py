"""What a device answers a query with."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.plan import HistogramQuestion, MeanQuestion, QuantileQuestion, QueryTask, SumQuestion
from protocol.queries import NonFiniteValue, answer_vector, bin_edges, half_width, middle

MEAN = QueryTask(field="temperature", low=-20.0, high=80.0, question=MeanQuestion())
BINS = MEAN.model_copy(update={"question": HistogramQuestion(bins=4)})


@pytest.mark.parametrize(
    ("value", "element"),
    [(30.0, 0.0), (80.0, 1.0), (-20.0, -1.0), (55.0, 0.5), (1e308, 1.0), (-1e308, -1.0)],
)
def test_a_value_is_clipped_and_centred(value: float, element: float) -> None:
    for question in (MeanQuestion(), SumQuestion()):
        vector = answer_vector(MEAN.model_copy(update={"question": question}), value)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, [element])
    assert middle(MEAN) == 30.0 and half_width(MEAN) == 50.0


@pytest.mark.parametrize(
    ("value", "index"),
    [(-20.0, 0), (-1e9, 0), (4.999, 0), (5.0, 1), (30.0, 2), (79.9, 3), (80.0, 3), (1e9, 3)],
)
def test_a_value_falls_into_one_bin(value: float, index: int) -> None:
    for question in (HistogramQuestion(bins=4), QuantileQuestion(q=0.5, bins=4)):
        vector = answer_vector(MEAN.model_copy(update={"question": question}), value)
        np.testing.assert_array_equal(vector, np.eye(4, dtype=np.float32)[index])
    np.testing.assert_array_equal(bin_edges(BINS, 4), [-20, 5, 30, 55, 80])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_answer(value: float) -> None:
    for task in (MEAN, BINS):
        with pytest.raises(NonFiniteValue, match="temperature"):
            answer_vector(task, value)


@given(
    low=st.floats(-1e15, 1e15),
    width=st.floats(1e-3, 1e15),
    value=st.floats(allow_nan=False, allow_infinity=False),
    bins=st.integers(2, 4096),
)
def test_no_value_has_a_norm_above_1(low: float, width: float, value: float, bins: int) -> None:
    try:
        task = QueryTask(field="x", low=low, high=low + width, question=MeanQuestion())
    except ValueError:
        return  # bounds that no plan can have
    (element,) = answer_vector(task, value).tolist()
    assert abs(element) <= 1.0
    unit = answer_vector(task.model_copy(update={"question": HistogramQuestion(bins=bins)}), value)
    assert unit.sum() == unit.max() == 1.0 and np.count_nonzero(unit) == 1
