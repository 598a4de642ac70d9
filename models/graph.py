"""What a `.tflite` file holds, as far as checking it needs: entry points, their operators and tensors.

Importable on the device: the standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ENTRY_BYTES = {0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1, 10: 8, 13: 4}
"""Bytes of one entry by type of tensor, as TensorFlow's schema.fbs numbers them."""
INT32, RESOURCE = 2, 13
"""Two of these types; the second is a handle of a variable."""


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
        return ENTRY_BYTES[self.kind] * math.prod(max(length, 1) for length in self.shape)


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
