"""A recurrent layer is a loop of its graph, which trains in the small runtime and is known to end."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from edge_client.adapters.model_check import check_in_child
from edge_client.adapters.tflite import Interpreter, TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import graph_file
from models.architectures import ARCHITECTURES
from models.export import ExportedModel, export
from models.graph import InvalidGraph
from models.manifest import InputSpec
from models.parity import TOLERANCE, prove_parity
from models.weights import encode_weights
from tests.model_mutants import damaged

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers


@pytest.fixture(scope="module")
def forecast() -> ExportedModel:
    return ARCHITECTURES["forecast"].export()


def test_a_loop_takes_one_batch_size_after_the_other(forecast: ExportedModel) -> None:
    """tflite-runtime 2.14 needs care here: its XNNPACK fails where a loop that ran gets another size."""
    trainer = TfliteTrainer(forecast.manifest, forecast.graph)
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 12, 3)).astype(np.float32)
    y = random.normal(size=(64, 3)).astype(np.float32)
    whole = trainer.predict(forecast.weights, x)
    for count in (1, 33, 2, 64, 5):
        assert trainer.predict(forecast.weights, x[:count]) == pytest.approx(
            whole[:count], rel=1e-4, abs=1e-4
        )
        trainer.train(forecast.weights, Examples("x", x[:count], y[:count]), TrainingConfig(1, 0.1), random)


@pytest.mark.parametrize(("kind", "every"), [(layers.GRU, True), (layers.LSTM, False)])
def test_loops_have_stock_gradients_in_the_small_runtime(kind: Any, every: bool) -> None:
    behind = [layers.Flatten()] if every else []
    model = tf.keras.Sequential(
        [layers.Input((17, 3)), kind(5, return_sequences=every), *behind, layers.Dense(4, name="last")]
    )
    scaling = InputSpec(shape=(17, 3), mean=(0.0,) * 3, std=(1.0,) * 3)
    made = export(
        model, name="try", labels="abcd", scaling=scaling, train_batch_size=8, example_gradients=True
    )

    assert prove_parity(model, made.graph, made.manifest, interpreter=Interpreter) < TOLERANCE


def test_the_number_of_steps_adds_nothing_to_a_file(forecast: ExportedModel) -> None:
    """1.3 x the bytes of all parameters, and 8 kB for each of two layers; 68 kB when it was unrolled."""
    assert len(forecast.graph) <= 1.3 * 4 * forecast.manifest.parameter_count + 2 * 8192


def test_a_device_takes_a_graph_with_loops(forecast: ExportedModel) -> None:
    check_in_child(forecast.manifest, forecast.graph, encode_weights(forecast.weights))
    graph = graph_file.read(forecast.graph)
    assert {"WHILE", "LESS"} <= set(graph.operators)
    train = graph.signatures["train"]
    assert graph.peak_bytes(train) > graph.subgraphs[train].peak_bytes()


def loop_of(model: Any) -> tuple[Any, Any, Any, Any]:
    """The first loop: its caller, operator, condition and body."""
    for graph in model.subgraphs:
        for operator in graph.operators:
            if isinstance(operator.builtinOptions, schema.WhileOptionsT):
                chosen = operator.builtinOptions
                condition, body = (
                    model.subgraphs[index] for index in (chosen.condSubgraphIndex, chosen.bodySubgraphIndex)
                )
                return graph, operator, condition, body
    raise AssertionError("no loop")


def put(model: Any, graph: Any, tensor: int, value: int) -> None:
    """Give a constant of one int32 another value."""
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.array([value], "<i4").tobytes(), np.uint8)
    model.buffers.append(buffer)
    graph.tensors[tensor].buffer = len(model.buffers) - 1


def stepping(body: Any) -> Any:
    """The operator of a body that counts."""
    return next(operator for operator in body.operators if body.outputs[1] in operator.outputs)


def endless(model: Any) -> None:
    _, _, condition, _ = loop_of(model)
    put(model, condition, condition.operators[0].inputs[1], 2**31 - 1)


def standing(model: Any) -> None:
    body = loop_of(model)[3]
    put(model, body, stepping(body).inputs[1], 0)


def capped(model: Any) -> None:
    """ReLU6 holds the counter at 6."""
    stepping(loop_of(model)[3]).builtinOptions.fusedActivationFunction = 3


def far_behind(model: Any) -> None:
    caller, loop, _, _ = loop_of(model)
    put(model, caller, loop.inputs[1], -(2**31))


def from_a_variable(model: Any) -> None:
    caller, loop, _, _ = loop_of(model)
    caller.tensors[loop.inputs[1]].buffer = 0
    caller.inputs = [*caller.inputs, loop.inputs[1]]


def set_back(model: Any) -> None:
    body = loop_of(model)[3]
    last = body.operators[-1]
    last.outputs = [body.outputs[1]]


def into_itself(model: Any) -> None:
    caller, loop, _, _ = loop_of(model)
    loop.builtinOptions.bodySubgraphIndex = model.subgraphs.index(caller)


def shared(model: Any) -> None:
    loop = loop_of(model)[1]
    loop.builtinOptions.condSubgraphIndex = loop.builtinOptions.bodySubgraphIndex


def nowhere(model: Any) -> None:
    loop_of(model)[1].builtinOptions.bodySubgraphIndex = 99


def other_types(model: Any) -> None:
    body = loop_of(model)[3]
    body.tensors[body.inputs[2]].type = schema.TensorType.INT64


def remembering(model: Any) -> None:
    """An operator of a body becomes one that writes a variable."""
    body = loop_of(model)[3]
    code = schema.OperatorCodeT()
    code.deprecatedBuiltinCode, code.builtinCode = 127, schema.BuiltinOperator.ASSIGN_VARIABLE
    model.operatorCodes.append(code)
    body.operators[0].opcodeIndex = len(model.operatorCodes) - 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (endless, "more than 128 steps"),
        (standing, "does not add 1"),
        (capped, "does not add 1"),
        (set_back, "does not add 1"),
        (far_behind, "starts at no constant"),
        (from_a_variable, "starts at no constant"),
        (into_itself, "calls subgraph"),
        (nowhere, "calls subgraph 99"),
        (shared, "another caller"),
        (other_types, "other types"),
        (remembering, "touches a variable"),
    ],
)
def test_a_loop_that_may_not_end_is_refused(
    forecast: ExportedModel, damage: Callable[[Any], None], words: str
) -> None:
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(forecast.graph))
    graph_file.read(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    damage(model)
    with pytest.raises(InvalidGraph, match=words):
        graph_file.read(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))


def test_two_hundred_damaged_loops_crash_at_most_their_child(forecast: ExportedModel, tmp_path: Path) -> None:
    forecast.write(tmp_path)
    found = damaged(tmp_path, 200)
    assert found["rejected"] > 160
    assert sum(count for how, count in found.items() if how.startswith("SIG")) < 10
