"""Read and check a `.tflite` file without a runtime: it came from the network, and a runtime trusts it.

Everything that a runtime follows without looking is followed here with bounds (`models.tables`): offsets,
vector lengths, and the numbers of tensors, buffers, operators and subgraphs. Operators are those that the
exporter makes; nothing that reads a file or is custom passes, and of those that call another subgraph only
loops that end (`models.graph_loops`).

Importable on the device: the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models import graph_loops
from models.graph import ENTRY_BYTES, INT32, RESOURCE, Graph, InvalidGraph, Operator, Subgraph, Tensor
from models.tables import File, Table

IDENTIFIER = b"TFL3"
MAX_TENSOR_BYTES = 2**30

# TensorFlow's schema.fbs: field numbers of each table.
_MODEL_CODES, _MODEL_SUBGRAPHS, _MODEL_BUFFERS, _MODEL_SIGNATURES = 1, 2, 4, 7
_WHILE_OPTIONS = 93
_CUSTOM = 32

OPERATORS: dict[int, str] = {
    0: "ADD",
    1: "AVERAGE_POOL_2D",
    2: "CONCATENATION",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    9: "FULLY_CONNECTED",
    14: "LOGISTIC",
    17: "MAX_POOL_2D",
    18: "MUL",
    19: "RELU",
    21: "RELU6",
    22: "RESHAPE",
    25: "SOFTMAX",
    28: "TANH",
    34: "PAD",
    36: "GATHER",
    37: "BATCH_TO_SPACE_ND",
    38: "SPACE_TO_BATCH_ND",
    39: "TRANSPOSE",
    40: "MEAN",
    41: "SUB",
    42: "DIV",
    43: "SQUEEZE",
    45: "STRIDED_SLICE",
    47: "EXP",
    49: "SPLIT",
    53: "CAST",
    55: "MAXIMUM",
    57: "MINIMUM",
    58: "LESS",
    59: "NEG",
    60: "PADV2",
    65: "SLICE",
    67: "TRANSPOSE_CONV",
    70: "EXPAND_DIMS",
    73: "LOG",
    74: "SUM",
    75: "SQRT",
    76: "RSQRT",
    77: "SHAPE",
    78: "POW",
    82: "REDUCE_MAX",
    83: "PACK",
    85: "ONE_HOT",
    88: "UNPACK",
    92: "SQUARE",
    97: "RESIZE_NEAREST_NEIGHBOR",
    98: "LEAKY_RELU",
    99: "SQUARED_DIFFERENCE",
    101: "ABS",
    102: "SPLIT_V",
    105: "REVERSE_V2",
    106: "ADD_N",
    111: "ELU",
    114: "QUANTIZE",
    119: "WHILE",
    122: "SCATTER_ND",
    126: "BATCH_MATMUL",
    130: "BROADCAST_TO",
    142: "VAR_HANDLE",
    143: "READ_VARIABLE",
    144: "ASSIGN_VARIABLE",
    150: "GELU",
    158: "SIGN",
}


def read(data: bytes) -> Graph:
    """Check a whole file and say what is in it.

    Raises:
        InvalidGraph: an offset, length or number leads out of the file or the graph, an operator is unknown,
            a tensor is too large, a constant has another size than its tensor, or a loop may not end.
    """
    if len(data) < 8 or data[4:8] != IDENTIFIER:
        raise InvalidGraph("it is no TensorFlow Lite flatbuffer")
    file = File(data)
    model = file.root()
    codes = [_operator_code(code) for code in model.tables(_MODEL_CODES, "operator codes")]
    buffers = [_buffer(buffer) for buffer in model.tables(_MODEL_BUFFERS, "buffers")]
    if not buffers or buffers[0][1]:
        raise InvalidGraph("buffer 0 is not the empty one")
    tables = model.tables(_MODEL_SUBGRAPHS, "subgraphs")
    subgraphs = tuple(_subgraph(table, codes, buffers) for table in tables)
    signatures = {}
    for table in model.tables(_MODEL_SIGNATURES, "signatures"):
        number = table.number(4, "I", 0)
        if number >= len(subgraphs):
            raise InvalidGraph(f"a signature is of subgraph {number} of {len(subgraphs)}")
        count = len(subgraphs[number].tensors)
        for ends in (0, 1):
            for end in table.tables(ends, "tensors of a signature"):
                end.text(0)
                _check_index(end.number(1, "I", 0), count, "a signature's tensor")
        name = table.text(2)
        if name in signatures:
            raise InvalidGraph("two signatures have the same name")
        signatures[name] = number
    graph = Graph(subgraphs, signatures, sum(size for _, size in buffers))
    graph_loops.check(graph)
    return graph


def _subgraph(table: Table, codes: Sequence[int], buffers: Sequence[tuple[int, int]]) -> Subgraph:
    tensors = tuple(_tensor(item, buffers) for item in table.tables(0, "tensors"))
    for field in (1, 2):
        for index in table.numbers(field, "i"):
            _check_index(index, len(tensors), "an input or output")
    written: set[int] = set(table.numbers(1, "i"))
    steps = []
    for operator in table.tables(3, "operators"):
        code = operator.number(0, "I", 0)
        _check_index(code, len(codes), "an operator's code")
        if codes[code] not in OPERATORS:
            raise InvalidGraph(f"operator {codes[code]} is not one that a trainable graph needs")
        name = OPERATORS[codes[code]]
        for index in operator.numbers(1, "i"):
            # -1 stands for an optional input that is left out.
            if index != -1:
                _check_index(index, len(tensors), "an operator's input")
                # A runtime reads what has no value yet, or never gets one, as it finds it.
                known = tensors[index].constant or 0 in tensors[index].shape or index in written
                if not known:
                    raise InvalidGraph(f"{name} reads tensor {index}, which has no value")
        outputs = operator.numbers(2, "i")
        for index in outputs:
            _check_index(index, len(tensors), "an operator's output")
            if tensors[index].constant:
                raise InvalidGraph(f"{name} writes into a constant")
        written.update(outputs)
        for field in (5, 7, 8):
            if operator.has(field) and operator.vector(field, 1)[1]:
                raise InvalidGraph(f"{name} has custom options, or changes its inputs")
        steps.append(Operator(name, operator.numbers(1, "i"), outputs, _options(name, operator.union(3, 4))))
    return Subgraph(tensors, tuple(steps), table.numbers(1, "i"), table.numbers(2, "i"))


def _options(name: str, found: tuple[int, Table | None]) -> tuple[int, ...]:
    kind, table = found
    if name == "WHILE":
        if kind != _WHILE_OPTIONS or table is None:
            raise InvalidGraph("a loop calls nothing")
        return table.number(0, "i", 0), table.number(1, "i", 0)
    if name == "ADD":
        return (table.number(0, "b", 0) if table is not None else 0,)
    return ()


def _tensor(table: Table, buffers: Sequence[tuple[int, int]]) -> Tensor:
    kind, buffer = table.number(1, "b", 0), table.number(2, "I", 0)
    if kind not in ENTRY_BYTES:
        raise InvalidGraph(f"a tensor has the type {kind}")
    _check_index(buffer, len(buffers), "a tensor's buffer")
    shape = tuple(table.numbers(0, "i"))
    if len(shape) > 8 or any(length < 0 for length in shape):
        raise InvalidGraph(f"a tensor has the shape {shape[:9]}")
    signature = table.numbers(7, "i")
    if signature and len(signature) != len(shape):
        raise InvalidGraph("a tensor has two shapes of different ranks")
    start, stored = buffers[buffer]
    size = ENTRY_BYTES[kind] * math.prod(shape)
    if size > MAX_TENSOR_BYTES:
        raise InvalidGraph(f"a tensor has {size} bytes, more than {MAX_TENSOR_BYTES}")
    if stored and stored != size and kind != RESOURCE:
        raise InvalidGraph(f"a constant has {stored} bytes, its tensor needs {size}")
    if table.has(6) or table.has(9):
        raise InvalidGraph("a tensor is sparse or a variant")
    single = bool(stored) and kind == INT32 and math.prod(shape) == 1
    number = table.file.unpack("i", start) if single else None
    return Tensor(kind, shape, bool(stored), number)


def _operator_code(table: Table) -> int:
    # Old files keep the number in a byte, new ones in an int; a reader takes the larger.
    code = max(table.number(0, "b", 0), table.number(3, "i", 0))
    return _CUSTOM if table.has(1) else code


def _buffer(table: Table) -> tuple[int, int]:
    """Where a constant's bytes start, and how many there are."""
    if table.number(1, "Q", 0) > 1 or table.number(2, "Q", 0) > 1:
        raise InvalidGraph("a buffer lies outside of the flatbuffer")
    return table.vector(0, 1)


def _check_index(index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise InvalidGraph(f"{what} is number {index} of {count}")
