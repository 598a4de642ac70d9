"""Recurrent layers, unrolled over their steps."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import LoweredLayer, activation_name
from models.layers.nonlinear import ACTIVATIONS
from models.layers.primitives import Tensor

keras = tf.keras.layers
MAX_STEPS = 128


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
        steps = layer.input_spec[0].shape[1] if layer.input_spec[0].shape else None
        steps = steps or layer.input_shape[1]
        self.refuse_unless(
            steps <= MAX_STEPS,
            f"it has {steps} steps, which would be unrolled",
            f"pool or stride to at most {MAX_STEPS} steps before it",
        )

    def inputs(self, kernel: Tensor, bias: Tensor | None, x: Tensor) -> list[Tensor]:
        """The product of every step's input with a kernel, plus a bias: t tensors (n, gates)."""
        product = primitives.linear(x, kernel)
        return list(tf.unstack(product if bias is None else primitives.add_bias(product, bias), axis=1))

    def outputs(self, states: list[Tensor]) -> Tensor:
        """The last state (n, u), or all of them (n, t, u)."""
        return tf.stack(states, 1) if self.layer.return_sequences else states[-1]

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
        kernel, recurrent = values[:2]
        outer, inner = tf.unstack(values[2], axis=0) if self.layer.use_bias else (None, None)
        units = self.layer.units
        state: Tensor | None = None
        states = []
        for step in self.inputs(kernel, outer, x):
            # Update and reset gate are one activation over both, the candidate another.
            gates, candidate = tf.split(step, [2 * units, units], -1)
            if state is None:
                # The first state is zero: nothing but the bias comes from it, and only where there is one.
                inside = inner
            else:
                inside = primitives.linear(state, recurrent)
                inside = inside if inner is None else primitives.add_bias(inside, inner)
            if inside is None:
                update, _ = tf.split(self.activate(gates, recurrent=True), 2, -1)
                fresh = self.activate(candidate)
            elif state is None:
                most, last = tf.split(inside, [2 * units, units], 0)
                update, reset = tf.split(
                    self.activate(primitives.add_bias(gates, most), recurrent=True), 2, -1
                )
                fresh = self.activate(candidate + primitives.scale(reset, last))
            else:
                most, last = tf.split(inside, [2 * units, units], -1)
                update, reset = tf.split(self.activate(gates + most, recurrent=True), 2, -1)
                fresh = self.activate(candidate + reset * last)
            state = fresh - update * fresh if state is None else fresh + update * (state - fresh)
            states.append(state)
        return self.outputs(states)


class Lstm(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates)."""

    handles = (keras.LSTM,)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        kernel, recurrent = values[:2]
        units = self.layer.units
        state: Tensor | None = None
        memory: Tensor | None = None
        states = []
        for step in self.inputs(kernel, values[2] if self.layer.use_bias else None, x):
            if state is not None:
                step = step + primitives.linear(state, recurrent)
            most, candidate, last = tf.split(step, [2 * units, units, units], -1)
            take, keep = tf.split(self.activate(most, recurrent=True), 2, -1)
            new = take * self.activate(candidate)
            memory = new if memory is None else keep * memory + new
            state = self.activate(last, recurrent=True) * self.activate(memory)
            states.append(state)
        return self.outputs(states)
