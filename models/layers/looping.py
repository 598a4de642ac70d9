"""A recurrence as a loop of the graph, forward and backward; see `primitives` for why gradients are written.

Unrolled, a file holds the operators of every step. A loop holds them once: `WHILE` with a counter, whose
bound is a constant that a device can check before it runs a file (`models.graph_loops`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import tensorflow as tf

from models.layers.primitives import Gradient, Tensor, differentiable

Cell = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""From a step's input (n, g), the states (n, u) before it and the weights to the states after it."""


_written_out = ContextVar("_written_out", default=False)


@contextmanager
def written_out() -> Iterator[None]:
    """Recurrences that are traced in here have their steps one behind the other, for prediction alone.

    TensorFlow 2.14 measures ranges for 8 bits in the main graph, and dies of a loop.
    """
    token = _written_out.set(True)
    try:
        yield
    finally:
        _written_out.reset(token)


def scan(
    cell: Cell, inputs: Tensor, states: int, units: int, weights: Sequence[Tensor], *, every: bool
) -> Tensor:
    """Apply a cell to inputs (t, n, g), one step after the other, from states that are zero.

    The way back computes each step again from the states before it, which the way forward has kept.

    Args:
        cell: one step; its own gradient must be made of builtins.
        inputs: one for each step; g is at least `units`.
        states: how many states of (n, units) the cell has. The first is its output.
        units: width of a state.
        weights: what the cell takes beside.
        every: whether the outputs of all steps are wanted.

    Returns:
        All outputs (t, n, units), or the last one (n, units).
    """
    length = int(inputs.shape[0])
    if _written_out.get():
        now, outputs = [inputs[0, :, :units] * 0.0] * states, []
        for step in tf.unstack(inputs, axis=0):
            now = cell(step, now, weights)
            outputs.append(now[0])
        return tf.stack(outputs) if every else now[0]

    @differentiable
    def run(inputs: Tensor, *weights: Tensor) -> tuple[Tensor, Gradient]:
        # Each step pushes its states in at the end, so that nothing is left of what these tensors start with.
        room = inputs[:, :, :units]
        zero = inputs[0, :, :units] * 0.0

        def forward(step: Tensor, now: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, ...]:
            now = cell(_at(inputs, step), now, weights)
            kept = [
                tf.concat([row[1:], tf.expand_dims(state, 0)], 0)
                for row, state in zip(kept, now, strict=True)
            ]
            return step + 1, now, kept

        _, last, kept = _repeated(length, forward, [zero] * states, [room] * states)

        def gradient(dy: Tensor) -> list[Tensor]:
            before = [tf.concat([tf.expand_dims(zero, 0), row[:-1]], 0) for row in kept]

            def backward(
                step: Tensor, pull: list[Tensor], slopes: list[Tensor], found: Tensor
            ) -> tuple[Tensor, ...]:
                place = length - 1 - step
                known = [tf.gather(inputs, place), *(tf.gather(row, place) for row in before), *weights]
                with tf.GradientTape() as tape:
                    tape.watch(known)
                    after = cell(known[0], known[1 : states + 1], known[states + 1 :])
                if every:
                    pull = [pull[0] + tf.gather(dy, place), *pull[1:]]
                first, *rest = tape.gradient(after, known, output_gradients=pull)
                slopes = [slope + more for slope, more in zip(slopes, rest[states:], strict=True)]
                return step + 1, rest[:states], slopes, tf.concat([tf.expand_dims(first, 0), found[:-1]], 0)

            start = [zero if every else dy, *[zero] * (states - 1)]
            _, _, slopes, found = _repeated(
                length, backward, start, [weight * 0.0 for weight in weights], inputs
            )
            return [found, *slopes]

        return kept[0] if every else last[0], gradient

    return run(inputs, *weights)


def _at(rows: Tensor, place: Tensor) -> Tensor:
    """One of rows (t, n, u), by a number of the graph.

    Where n is not fixed, by an operator that makes tflite-runtime 2.14 leave the loop to its own kernels: its
    XNNPACK fails when a loop that it has run gets another n.
    """
    if rows.shape[1] is not None:
        return tf.gather(rows, place)
    part = tf.slice(rows, tf.stack([place, 0, 0]), [1, -1, rows.shape[2]])
    return tf.reshape(part, [-1, rows.shape[2]])


def _repeated(count: int, body: Callable[..., tuple[Tensor, ...]], *start: Tensor) -> tuple[Tensor, ...]:
    """A body, from a counter that starts at 0 and other values to the next ones, so many times."""
    result: tuple[Tensor, ...] = tf.while_loop(
        lambda step, *_: step < count, body, [tf.constant(0), *start], parallel_iterations=1
    )
    return result
