"""Read and check a `.tflite` file without a runtime: it came from the network, and a runtime trusts it.

Everything that a runtime follows without looking is followed here with bounds: offsets, vector lengths, and
the numbers of tensors, buffers, operators and subgraphs. Operators are those that the exporter makes; nothing
that reads a file or is custom passes, and of those that call another subgraph only loops that end
(`models.graph_loops`).

Importable on the device: the standard library only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

IDENTIFIER = b"TFL3"
MAX_ITEMS = 200_000
"""Tables or entries of one vector, other than bytes: a bound for the work that a check takes."""
MAX_TENSOR_BYTES = 2**30

# TensorFlow's schema.fbs: field numbers of each table.
_MODEL_CODES, _MODEL_SUBGRAPHS, _MODEL_BUFFERS, _MODEL_SIGNATURES = 1, 2, 4, 7
_SIZES = {0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1, 10: 8, 13: 4}
"""Bytes of one entry by type of tensor; 13 is a handle of a variable."""
_INT32, _RESOURCE = 2, 13
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


class InvalidGraph(ValueError):
    """Bytes that are no graph of this kind; says what is wrong and where."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: number of its type, shape, whether it is a constant, and that of a single int32."""

    kind: int
    shape: tuple[int, ...]
    constant: bool
    number: int | None = None

    @property
    def size(self) -> int:
        """Bytes of its entries; an axis of unknown length counts once."""
        return _SIZES[self.kind] * math.prod(max(length, 1) for length in self.shape)


@dataclass(frozen=True, slots=True)
class Operator:
    """One step: its name, and the numbers of the tensors that it reads (-1 for none) and writes.

    Attributes:
        options: of a `WHILE` the subgraphs of condition and body; of an `ADD` its activation.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Subgraph:
    """One entry point or part of a loop: tensors, operators, and which tensors come in and go out."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def peak_bytes(self) -> int:
        """Largest sum of tensors that are alive at once: about what a runtime's arena takes.

        Constants are not counted, nor is the scratch memory that an operator's implementation may want.
        """
        last: dict[int, int] = {}
        for step, operator in enumerate(self.operators):
            for index in (*operator.inputs, *operator.outputs):
                last[index] = step
        alive: dict[int, int] = {}
        peak = 0
        for step, operator in enumerate(self.operators):
            for index in (*operator.inputs, *operator.outputs):
                if index >= 0 and not self.tensors[index].constant:
                    alive[index] = self.tensors[index].size
            peak = max(peak, sum(alive.values()))
            for index in [index for index in alive if last[index] == step]:
                del alive[index]
        return peak


@dataclass(frozen=True, slots=True)
class Graph:
    """What a file holds.

    Attributes:
        subgraphs: in the file's order.
        signatures: entry point -> number of its subgraph.
        constant_bytes: of all constants together.
    """

    subgraphs: tuple[Subgraph, ...]
    signatures: dict[str, int]
    constant_bytes: int

    @property
    def operators(self) -> list[str]:
        """Sorted names of all operators."""
        return sorted({operator.name for graph in self.subgraphs for operator in graph.operators})

    @property
    def writers(self) -> frozenset[str]:
        """The entry points that change variables; the others remember nothing of what they were given.

        Loops touch no variable (`models.graph_loops`), so an entry point's own operators tell.
        """
        return frozenset(
            name
            for name, number in self.signatures.items()
            if any(operator.name == "ASSIGN_VARIABLE" for operator in self.subgraphs[number].operators)
        )

    def peak_bytes(self, number: int) -> int:
        """That of a subgraph, with what the largest of its loops takes."""
        graph = self.subgraphs[number]
        loops = [operator.options for operator in graph.operators if operator.name == "WHILE"]
        return graph.peak_bytes() + max((self.peak_bytes(body) for _, body in loops), default=0)


def read(data: bytes) -> Graph:
    """Check a whole file and say what is in it.

    Raises:
        InvalidGraph: an offset, length or number leads out of the file or the graph, an operator is unknown,
            a tensor is too large, a constant has another size than its tensor, or a loop may not end.
    """
    if len(data) < 8 or data[4:8] != IDENTIFIER:
        raise InvalidGraph("it is no TensorFlow Lite flatbuffer")
    file = _File(data)
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
    from models import graph_loops  # which needs the types of this module

    graph_loops.check(graph)
    return graph


def _subgraph(table: _Table, codes: Sequence[int], buffers: Sequence[tuple[int, int]]) -> Subgraph:
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


def _options(name: str, found: tuple[int, _Table | None]) -> tuple[int, ...]:
    kind, table = found
    if name == "WHILE":
        if kind != _WHILE_OPTIONS or table is None:
            raise InvalidGraph("a loop calls nothing")
        return table.number(0, "i", 0), table.number(1, "i", 0)
    if name == "ADD":
        return (table.number(0, "b", 0) if table is not None else 0,)
    return ()


def _tensor(table: _Table, buffers: Sequence[tuple[int, int]]) -> Tensor:
    kind, buffer = table.number(1, "b", 0), table.number(2, "I", 0)
    if kind not in _SIZES:
        raise InvalidGraph(f"a tensor has the type {kind}")
    _check_index(buffer, len(buffers), "a tensor's buffer")
    shape = tuple(table.numbers(0, "i"))
    if len(shape) > 8 or any(length < 0 for length in shape):
        raise InvalidGraph(f"a tensor has the shape {shape[:9]}")
    signature = table.numbers(7, "i")
    if signature and len(signature) != len(shape):
        raise InvalidGraph("a tensor has two shapes of different ranks")
    start, stored = buffers[buffer]
    size = _SIZES[kind] * math.prod(shape)
    if size > MAX_TENSOR_BYTES:
        raise InvalidGraph(f"a tensor has {size} bytes, more than {MAX_TENSOR_BYTES}")
    if stored and stored != size and kind != _RESOURCE:
        raise InvalidGraph(f"a constant has {stored} bytes, its tensor needs {size}")
    if table.has(6) or table.has(9):
        raise InvalidGraph("a tensor is sparse or a variant")
    single = bool(stored) and kind == _INT32 and math.prod(shape) == 1
    number = table.file.unpack("i", start) if single else None
    return Tensor(kind, shape, bool(stored), number)


def _operator_code(table: _Table) -> int:
    # Old files keep the number in a byte, new ones in an int; a reader takes the larger.
    code = max(table.number(0, "b", 0), table.number(3, "i", 0))
    return _CUSTOM if table.has(1) else code


def _buffer(table: _Table) -> tuple[int, int]:
    """Where a constant's bytes start, and how many there are."""
    if table.number(1, "Q", 0) > 1 or table.number(2, "Q", 0) > 1:
        raise InvalidGraph("a buffer lies outside of the flatbuffer")
    return table.vector(0, 1)


def _check_index(index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise InvalidGraph(f"{what} is number {index} of {count}")


class _File:
    """The bytes, and a bound on how much of them is looked at."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.budget = MAX_ITEMS

    def root(self) -> _Table:
        return _Table(self, self.unpack("I", 0))

    def unpack(self, form: str, at: int) -> int:
        if at < 0 or at + struct.calcsize("<" + form) > len(self.data):
            raise InvalidGraph(f"something lies at byte {at}, beyond the end")
        return int(struct.unpack_from("<" + form, self.data, at)[0])

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise InvalidGraph(f"it has more than {MAX_ITEMS} parts")


class _Table:
    """One table of a flatbuffer, at a byte of the file."""

    def __init__(self, file: _File, at: int) -> None:
        file.spend(1)
        self.file, self._at = file, at
        self._fields = at - file.unpack("i", at)
        self._length = file.unpack("H", self._fields)
        size = file.unpack("H", self._fields + 2)
        if self._length < 4 or self._length % 2 or self._fields + self._length > len(file.data):
            raise InvalidGraph(f"the table at byte {at} has no fields")
        if size < 4 or at + size > len(file.data):
            raise InvalidGraph(f"the table at byte {at} reaches beyond the end")
        self._size = size

    def has(self, field: int) -> bool:
        return self._where(field) is not None

    def _where(self, field: int) -> int | None:
        place = 4 + 2 * field
        offset = self.file.unpack("H", self._fields + place) if place + 2 <= self._length else 0
        if offset >= self._size:
            raise InvalidGraph(f"field {field} of the table at byte {self._at} is outside of it")
        return self._at + offset if offset else None

    def number(self, field: int, form: str, default: int) -> int:
        at = self._where(field)
        return default if at is None else self.file.unpack(form, at)

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """Where the entries of a vector start, and how many there are."""
        at = self._where(field)
        if at is None:
            return 0, 0
        start = at + self.file.unpack("I", at)
        count = self.file.unpack("I", start)
        if start + 4 + count * width > len(self.file.data):
            raise InvalidGraph(f"the vector at byte {start} reaches beyond the end")
        return start + 4, count

    def numbers(self, field: int, form: str) -> tuple[int, ...]:
        width = struct.calcsize("<" + form)
        start, count = self.vector(field, width)
        self.file.spend(count)
        return struct.unpack_from(f"<{count}{form}", self.file.data, start) if count else ()

    def tables(self, field: int, what: str) -> list[_Table]:
        start, count = self.vector(field, 4)
        if count > self.file.budget:
            raise InvalidGraph(f"it has {count} {what}")
        places = range(start, start + 4 * count, 4)
        return [_Table(self.file, place + self.file.unpack("I", place)) for place in places]

    def union(self, kind: int, field: int) -> tuple[int, _Table | None]:
        """The kind of a union, and its table, as far as it is one."""
        at, chosen = self._where(field), self.number(kind, "B", 0)
        if not chosen or at is None:
            return chosen, None
        return chosen, _Table(self.file, at + self.file.unpack("I", at))

    def text(self, field: int) -> str:
        start, count = self.vector(field, 1)
        if count > 1024:
            raise InvalidGraph("a name is longer than 1024 bytes")
        return self.file.data[start : start + count].decode("utf-8", "replace")
