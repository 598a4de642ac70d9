"""Edit and inspect the converted flatbuffer. Needs TensorFlow."""

from __future__ import annotations

from typing import Any

import flatbuffers
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from models import graph_file
from models.graph import InvalidGraph

OPERATOR_NAMES: dict[int, str] = {
    code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)
}


class NonBuiltinOperator(ValueError):
    """The converted graph uses an operator that the small runtimes do not have."""


def finish(data: bytes) -> bytes:
    """Check a converted graph and take out what the device does not need.

    The initial values of the variables are taken out, since weights always come from a weights file: the
    graph stays small whatever the number of parameters, and a version of the model is only its weights. So
    `set_weights` must run before anything else; the device's trainer passes weights on every call.

    Raises:
        NonBuiltinOperator: an operator is custom or needs the Flex delegate, or devices would refuse it.
    """
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(data))
    operators_of(model)
    _drop_initial_values(model)
    return _compact(model)


def compact(data: bytes) -> bytes:
    """A converted graph for prediction alone, with what is equal in it once: about half of a small file.

    Raises:
        NonBuiltinOperator: an operator is custom or needs the Flex delegate, or devices would refuse it.
    """
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(data))
    operators_of(model)
    return _compact(model)


def _compact(model: Any) -> bytes:
    _share_constants(model)
    _drop_what_says_nothing(model)
    builder = _SharingBuilder(1024)
    builder.Finish(model.Pack(builder), file_identifier=graph_file.IDENTIFIER)
    finished = bytes(builder.Output())
    try:
        graph_file.read(finished)
    except InvalidGraph as error:
        # Better here than on every device.
        raise NonBuiltinOperator(f"devices would refuse the graph: {error}") from error
    return finished


def operators(data: bytes) -> list[str]:
    """Sorted names of the builtin operators that a graph uses.

    Raises:
        NonBuiltinOperator: an operator is custom or needs the Flex delegate.
    """
    return operators_of(flatbuffer_utils.convert_bytearray_to_object(bytearray(data)))


def operators_of(model: Any) -> list[str]:
    """As `operators`, for a parsed graph."""
    names = set()
    for code in model.operatorCodes:
        name = OPERATOR_NAMES[_builtin_code(code)]
        if code.customCode is not None or name == "CUSTOM":
            raise NonBuiltinOperator(f"the graph needs the operator {_text(code.customCode)}")
        names.add(name)
    return sorted(names)


def _builtin_code(code: Any) -> int:
    """Old files keep the number in a byte, new ones in an int; a reader takes the larger."""
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def _drop_initial_values(model: Any) -> None:
    """Remove the calls that fill the variables once, and the subgraph that they call."""
    called = set()
    for graph in model.subgraphs:
        kept = []
        for operator in graph.operators:
            if OPERATOR_NAMES[_builtin_code(model.operatorCodes[operator.opcodeIndex])] == "CALL_ONCE":
                called.add(operator.builtinOptions.initSubgraphIndex)
            else:
                kept.append(operator)
        graph.operators = kept
    if len(called) != 1:
        raise NonBuiltinOperator(f"expected one subgraph of initial values, found {sorted(called)}")
    (number,) = called
    dropped = {tensor.buffer for tensor in model.subgraphs.pop(number).tensors}
    for loop in _loops(model):
        loop.condSubgraphIndex -= loop.condSubgraphIndex > number
        loop.bodySubgraphIndex -= loop.bodySubgraphIndex > number
    for signature in model.signatureDefs:
        signature.subgraphIndex -= signature.subgraphIndex > number
    # A small constant, such as a single zero, may have its bytes in common with an initial value.
    for buffer in dropped - {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}:
        model.buffers[buffer].data = None


def _loops(model: Any) -> list[Any]:
    """The options of every `WHILE`."""
    return [
        operator.builtinOptions
        for graph in model.subgraphs
        for operator in graph.operators
        if isinstance(operator.builtinOptions, schema.WhileOptionsT)
    ]


def _share_constants(model: Any) -> None:
    """Keep the bytes of a constant once: training and inference have their own copies of a frozen layer."""
    first: dict[bytes, int] = {}
    kept: dict[int, int] = {}
    for number, buffer in enumerate(model.buffers):
        if buffer.data is not None and len(buffer.data):
            kept[number] = first.setdefault(bytes(buffer.data), number)
    # The converter itself lets tensors of several subgraphs have one buffer.
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.buffer = kept.get(tensor.buffer, tensor.buffer)
    for number, other in kept.items():
        if number != other:
            model.buffers[number].data = None


def _drop_what_says_nothing(model: Any) -> None:
    """Drop names of inner tensors, quantisation by no scale, and empty buffers: a quarter of a small file."""
    kept, place = [model.buffers[0]], {0: 0}

    def moved(buffer: int) -> int:
        data = model.buffers[buffer].data
        if data is None or len(data) == 0:
            return 0
        if buffer not in place:
            place[buffer] = len(kept)
            kept.append(model.buffers[buffer])
        return place[buffer]

    entries = {signature.subgraphIndex for signature in model.signatureDefs or ()} or {0}
    for number, graph in enumerate(model.subgraphs):
        ends = {int(index) for index in (*graph.inputs, *graph.outputs)} if number in entries else set()
        for index, tensor in enumerate(graph.tensors):
            if index not in ends:
                tensor.name = None
            scale = getattr(tensor.quantization, "scale", None)
            if scale is None or len(scale) == 0:
                tensor.quantization = None
            tensor.buffer = moved(tensor.buffer)
    for entry in model.metadata or ():
        entry.buffer = moved(entry.buffer)
    model.buffers = kept


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes what is equal once, be it numbers or a table: most tensors are like another one.

    A third of a small file. Readers follow offsets, and do not mind where two of them lead.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._known: dict[object, int] = {}
        self._start = 0
        self._fields: list[object] = []

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802
        """As in the base class."""
        self._start, self._fields = self.Offset(), []
        return int(super().StartVector(elemSize, numElems, alignment))

    def PrependUOffsetTRelative(self, off: int) -> None:  # noqa: N802
        """As in the base class."""
        # In bytes an offset counts from where it is; where it leads is what can be compared.
        self._fields.append(off)
        super().PrependUOffsetTRelative(off)

    def EndVector(self) -> int:  # noqa: N802
        """As in the base class, or where the same vector of numbers is already."""
        end = int(super().EndVector())
        if self._fields:
            return end
        known = self._known.setdefault(bytes(self.Bytes[self.head : len(self.Bytes) - self._start]), end)
        if known != end:
            self._forget()
        return known

    def StartObject(self, numfields: int) -> None:  # noqa: N802
        """As in the base class."""
        self._start, self._fields = self.Offset(), []
        super().StartObject(numfields)

    def PrependSlot(self, flags: object, o: int, x: object, d: object) -> None:  # noqa: N802
        """As in the base class."""
        if x != d:
            self._fields.append((flags, o, x))
        super().PrependSlot(flags, o, x, d)

    def PrependUOffsetTRelativeSlot(self, o: int, x: int, d: int) -> None:  # noqa: N802
        """As in the base class."""
        if x != d:
            self._fields.append(o)
        super().PrependUOffsetTRelativeSlot(o, x, d)

    def EndObject(self) -> int:  # noqa: N802
        """As in the base class, or where the same table is already."""
        content = tuple(self._fields)
        if content not in self._known:
            self._known[content] = int(super().EndObject())
        else:
            # Before the table gets a description of its fields, which later ones would refer to.
            self.nested, self.current_vtable = False, None
            self._forget()
        return self._known[content]

    def _forget(self) -> None:
        """Take back what was written since the start."""
        self.head: int = len(self.Bytes) - self._start


def _text(name: Any) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
