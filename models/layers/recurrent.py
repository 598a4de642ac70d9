"""Recurrent layers, as loops over their steps."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.graph_loops import MAX_STEPS
from models.layers import primitives
from models.layers.looping import Cell, scan
from models.layers.lowering import LoweredLayer, activation_name
from models.layers.nonlinear import ACTIVATIONS
from models.layers.primitives import Tensor

keras = tf.keras.layers


class _Recurrent(LoweredLayer):
    """What both kinds share. The products with the inputs of all steps are one product."""

    def check(self) -> None:
        layer = self.layer
        for attribute in ("activation", "recurrent_activation"):
            activation_name(layer, attribute)
        self.refuse_unless(
            not (layer.go_backwards or layer.stateful or layer.return_state or layer.time_major),
            "it goes backwards, keeps or returns its state, or has time first",
            "use a plain one",
        )
        self.refuse_unless(
            not layer.dropout and not layer.recurrent_dropout,
            "it has dropout",
            "put Dropout layers around it",
        )
        self.refuse_unless(
            not isinstance(getattr(layer, "input_shape", None), list),
            "it is given the state that it starts from",
            "start it from zeros: call it on its input alone",
        )
        steps = self.input_shape()[1] or 0
        self.refuse_unless(
            steps <= MAX_STEPS,
            f"it has {steps} steps, more than devices accept",
            f"pool or stride to at most {MAX_STEPS} steps before it",
        )

    def run(
        self, cell: Cell, states: int, x: Tensor, values: Sequence[Tensor], bias: Tensor | None
    ) -> Tensor:
        """The last output (n, u), or all of them (n, t, u), of x (n, t, i).

        `values` are the kernel of the inputs, to which `bias` belongs, and what the cell takes.
        """
        products = primitives.linear(x, values[0])
        products = products if bias is None else primitives.add_bias(products, bias)
        steps, every = primitives.transpose(products, [1, 0, 2]), bool(self.layer.return_sequences)
        found = scan(cell, steps, states, self.layer.units, values[1:], every=every)
        return primitives.transpose(found, [1, 0, 2]) if every else found

    def activate(self, x: Tensor, *, recurrent: bool = False) -> Tensor:
        """The activation of the gates (`recurrent`), or of the state."""
        return ACTIVATIONS[
            activation_name(self.layer, "recurrent_activation" if recurrent else "activation")
        ](x)


class Gru(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078; reset after the product, as in Keras)."""

    handles = (keras.GRU,)

    def check(self) -> None:
        super().check()
        self.refuse_unless(self.layer.reset_after, "it resets before the product", "use reset_after=True")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        units = self.layer.units
        outer, *inner = tf.unstack(values[2], axis=0) if self.layer.use_bias else (None,)

        def cell(step: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
            # Update and reset gate are one activation over both, the candidate another.
            (state,), (recurrent, *bias) = states, weights
            inside = primitives.linear(state, recurrent)
            inside = primitives.add_bias(inside, bias[0]) if bias else inside
            gates, candidate = _parted(step, [2 * units, units])
            most, last = _parted(inside, [2 * units, units])
            update, reset = _parted(self.activate(gates + most, recurrent=True), [units, units])
            fresh = self.activate(candidate + reset * last)
            return [fresh + update * (state - fresh)]

        return self.run(cell, 1, x, [*values[:2], *inner], outer)


class Lstm(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates)."""

    handles = (keras.LSTM,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        units = self.layer.units

        def cell(step: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
            state, memory = states
            step = step + primitives.linear(state, weights[0])
            most, candidate, last = _parted(step, [2 * units, units, units])
            take, keep = _parted(self.activate(most, recurrent=True), [units, units])
            memory = keep * memory + take * self.activate(candidate)
            return [self.activate(last, recurrent=True) * self.activate(memory), memory]

        return self.run(cell, 2, x, values[:2], values[2] if self.layer.use_bias else None)


def _parted(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """x (n, sum of sizes) cut along its last axis."""
    return list(tf.split(x, list(sizes), -1))
