"""Check the loops of a graph that came from the network: each one ends, whatever its tensors hold.

The exporter writes one kind of loop. Its condition is a counter below a constant, its body adds 1 to the
counter, and neither calls another loop or touches a variable. So the number of steps is known without running
anything.

Importable on the device: the standard library only.
"""

from __future__ import annotations

from models.graph import Graph, InvalidGraph, Operator, Subgraph

MAX_STEPS = 128
"""Steps of one loop."""


def check(graph: Graph) -> None:
    """Follow every `WHILE` to the subgraphs that it calls.

    Raises:
        InvalidGraph: it calls what is not there, is an entry point, is called elsewhere or has other tensors;
            it holds a loop or a variable; or it counts beyond `MAX_STEPS`, or not at all.
    """
    taken = set(graph.signatures.values())
    for number, caller in enumerate(graph.subgraphs):
        for loop in caller.operators:
            if loop.name != "WHILE":
                continue
            for called in loop.options:
                # What is called comes later, by one loop alone: no call leads back.
                _need(number < called < len(graph.subgraphs), f"calls subgraph {called}")
                _need(called not in taken, "calls a subgraph that has another caller")
                taken.add(called)
            condition, body = (graph.subgraphs[called] for called in loop.options)
            _check_tensors(caller, loop, condition, body)
            _check_end(caller, loop, condition, body)


def _check_tensors(caller: Subgraph, loop: Operator, condition: Subgraph, body: Subgraph) -> None:
    """What is handed on has the same types everywhere, and the same shapes."""
    _need(min(loop.inputs, default=-1) >= 0, "leaves out a tensor")
    ends = (
        [caller.tensors[index] for index in loop.inputs],
        [caller.tensors[index] for index in loop.outputs],
        [condition.tensors[index] for index in condition.inputs],
        [body.tensors[index] for index in body.inputs],
        [body.tensors[index] for index in body.outputs],
    )
    kinds = {tuple((tensor.kind, len(tensor.shape)) for tensor in part) for part in ends}
    _need(len(kinds) == 1, "hands on tensors of other types or ranks")
    _need(len(set(body.inputs)) == len(body.inputs), "has one tensor twice")
    for graph in (condition, body):
        names = {operator.name for operator in graph.operators}
        _need("WHILE" not in names, "has a loop in it")
        # Which entry points change a variable is told by their own operators.
        _need(not any(name.endswith(("_VARIABLE", "_HANDLE")) for name in names), "touches a variable")


def _check_end(caller: Subgraph, loop: Operator, condition: Subgraph, body: Subgraph) -> None:
    """It counts from a constant to a constant."""
    _need(len(condition.operators) == 1, "has a condition of several steps")
    (test,) = condition.operators
    _need(
        test.name == "LESS"
        and len(test.inputs) == 2
        and test.inputs[0] in condition.inputs
        and test.outputs == condition.outputs,
        "has another condition than a counter below a constant",
    )
    limit = condition.tensors[test.inputs[1]].number
    _need(limit is not None and limit <= MAX_STEPS, f"may take more than {MAX_STEPS} steps")
    place = condition.inputs.index(test.inputs[0])
    start = caller.tensors[loop.inputs[place]].number
    _need(start is not None and start >= 0, "starts at no constant")
    counter, following = body.inputs[place], body.outputs[place]
    steps = [operator for operator in body.operators if {counter, following} & set(operator.outputs)]
    _need(
        len(steps) == 1
        and steps[0].name == "ADD"
        and steps[0].outputs == (following,)
        and following != counter
        and len(steps[0].inputs) == 2
        and steps[0].inputs[0] == counter
        and body.tensors[steps[0].inputs[1]].number == 1
        and steps[0].options[0] == 0,
        "does not add 1 to its counter",
    )


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise InvalidGraph(f"a loop {reason}")
