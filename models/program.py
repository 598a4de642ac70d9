"""The entry points of a trainable graph, as TensorFlow functions over a few variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from models.layers.primitives import Tensor
from models.losses import LOSSES
from models.manifest import LOCAL_SIGNATURE, LossName, OptimizerSpec, SignatureSpec, TargetSpec
from models.network import Network


@dataclass(frozen=True)
class TrainingForm:
    """What a training step is, apart from the network.

    Attributes:
        batch: examples in one call of `train`.
        loss: what it lowers.
        target: what an example's truth looks like.
        optimizer: what it does with a gradient.
        accumulation: calls of `train` that make one step.
        example_gradients: whether the graph also gives one example's gradient, for DP-SGD on the device.
    """

    batch: int
    loss: LossName
    target: TargetSpec
    optimizer: OptimizerSpec
    accumulation: int
    example_gradients: bool = False


def signatures_of(network: Network, form: TrainingForm) -> tuple[SignatureSpec, ...]:
    """The entry points that `build_program` makes, as the manifest names them."""
    inputs = ["x", "y", "mask", "lr", "mu"]
    inputs += ["keep"] if network.dropouts else []
    inputs += ["last"] if form.accumulation > 1 else []
    local = network.parameter_count > network.shared_count
    vectors = ("weights", "local") if local else ("weights",)
    start = (SignatureSpec(name=LOCAL_SIGNATURE, inputs=(), outputs=("local",)),) if local else ()
    always = (
        SignatureSpec(name="train", inputs=tuple(inputs), outputs=("loss",)),
        SignatureSpec(name="infer", inputs=("x",), outputs=("logits",)),
        SignatureSpec(name="get_weights", inputs=(), outputs=vectors),
        SignatureSpec(name="set_weights", inputs=vectors, outputs=("count",)),
        *start,
    )
    if not form.example_gradients:
        return always
    one = ("x", "y", "keep") if network.dropouts else ("x", "y")
    return (
        *always,
        SignatureSpec(name="gradient", inputs=one, outputs=("gradient",)),
        SignatureSpec(name="apply", inputs=("gradient", "lr", "mu"), outputs=("count",)),
    )


def build_program(network: Network, form: TrainingForm) -> Any:
    """A `tf.Module` with the functions that `signatures_of` names.

    Its variables: the parameters, where training started, and what optimizer and accumulation remember. Local
    parameters come last in them. They enter and leave as a vector of their own, and `start_local` gives the
    Keras model's present ones.
    """
    count, shared = network.parameter_count, network.shared_count
    start = network.flat_weights()[shared:]
    module = tf.Module()
    module.theta = tf.Variable(tf.zeros([count]), name="theta")
    module.anchor = tf.Variable(tf.zeros([count]), name="anchor")
    rule = _Rule(module, count, form.optimizer)
    summing = _Sum(module, count) if form.accumulation > 1 else None

    def train(
        x: Tensor, y: Tensor, mask: Tensor, lr: Tensor, mu: Tensor, **more: Tensor
    ) -> dict[str, Tensor]:
        theta = module.theta.read_value()
        values = network.split(theta)
        # A sum can be added to; a mean is right at once.
        total = tf.reduce_sum(mask)
        share = mask / total if summing is None else mask
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = LOSSES[form.loss](network.forward(values, x, more.get("keep")), y, share)
        gradients = tape.gradient(loss, values)
        gradient = tf.concat([tf.reshape(part, [-1]) for part in gradients], 0)
        last = None
        if summing is not None:
            last = more["last"]
            gradient = summing.mean(gradient, total, last)
            loss = loss / total
        # FedProx (Li et al. 2020, arXiv 1812.06127, eq. 2): the gradient of mu/2 |theta - anchor|^2.
        pull = mu * (theta - module.anchor.read_value())
        if shared < count:
            # The server knows nothing of local parameters that they could be pulled to.
            pull = tf.concat([pull[:shared], pull[shared:] * 0.0], 0)
        module.theta.assign(theta - rule.step(gradient + pull, lr, last))
        return {"loss": loss}

    def gradient(x: Tensor, y: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        values = network.split(module.theta.read_value())
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = LOSSES[form.loss](network.forward(values, x, keep), y, tf.ones([1]))
        parts = tape.gradient(loss, values)
        return {"gradient": tf.concat([tf.reshape(part, [-1]) for part in parts], 0)}

    def apply(gradient: Tensor, lr: Tensor, mu: Tensor) -> dict[str, Tensor]:
        theta = module.theta.read_value()
        pull = mu * (theta - module.anchor.read_value())
        module.theta.assign(theta - rule.step(gradient + pull, lr, None))
        return {"count": tf.size(gradient)}

    def infer(x: Tensor) -> dict[str, Tensor]:
        return {"logits": network.forward(network.split(module.theta.read_value()), x)}

    def get_weights() -> dict[str, Tensor]:
        return {"weights": module.theta.read_value()}

    def get_both() -> dict[str, Tensor]:
        theta = module.theta.read_value()
        return {"weights": theta[:shared], "local": theta[shared:]}

    def start_local() -> dict[str, Tensor]:
        return {"local": tf.constant(start)}

    def set_weights(weights: Tensor) -> dict[str, Tensor]:
        module.theta.assign(weights)
        module.anchor.assign(weights)
        rule.reset(weights)
        if summing is not None:
            summing.reset(weights)
        return {"count": tf.size(weights)}

    def set_both(weights: Tensor, local: Tensor) -> dict[str, Tensor]:
        return set_weights(tf.concat([weights, local], 0))

    shape = network.example_shape
    scalar = ("lr", "mu") if summing is None else ("lr", "mu", "last")
    specs = {
        "x": tf.TensorSpec([form.batch, *shape], tf.float32, "x"),
        "y": tf.TensorSpec([form.batch, *form.target.shape], tf.as_dtype(form.target.dtype), "y"),
        "mask": tf.TensorSpec([form.batch], tf.float32, "mask"),
        **{name: tf.TensorSpec([], tf.float32, name) for name in scalar},
    }
    width = sum(size for size, _ in network.dropouts)
    if network.dropouts:
        specs["keep"] = tf.TensorSpec([form.batch, width], tf.float32, "keep")
    order = signatures_of(network, form)[0].inputs
    inputs: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "train": (_named(train, order), [specs[name] for name in order]),
        "infer": (infer, [tf.TensorSpec([None, *shape], tf.float32, "x")]),
        "get_weights": (get_weights, []),
        "set_weights": (set_weights, [tf.TensorSpec([count], tf.float32, "weights")]),
    }
    if shared < count:
        vectors = [
            tf.TensorSpec([shared], tf.float32, "weights"),
            tf.TensorSpec([count - shared], tf.float32, "local"),
        ]
        inputs |= {
            "get_weights": (get_both, []),
            "set_weights": (set_both, vectors),
            LOCAL_SIGNATURE: (start_local, []),
        }
    if form.example_gradients:
        target = tf.TensorSpec([1, *form.target.shape], tf.as_dtype(form.target.dtype), "y")
        example = [tf.TensorSpec([1, *shape], tf.float32, "x"), target]
        if network.dropouts:
            example.append(tf.TensorSpec([1, width], tf.float32, "keep"))
        else:
            gradient = _without_dropout(gradient)
        vector = tf.TensorSpec([count], tf.float32, "gradient")
        inputs["gradient"] = (gradient, example)
        inputs["apply"] = (apply, [vector, tf.TensorSpec([], tf.float32, "lr"), specs["mu"]])
    for name, (function, signature) in inputs.items():
        setattr(module, name, tf.function(function, input_signature=signature, autograph=False))
    return module


def _named(train: Callable[..., Any], order: tuple[str, ...]) -> Callable[..., Any]:
    """`train` with exactly these arguments: the converter takes the names of inputs from a function's own."""
    extra = order[5:]
    if extra == ("keep",):
        return lambda x, y, mask, lr, mu, keep: train(x, y, mask, lr, mu, keep=keep)
    if extra == ("last",):
        return lambda x, y, mask, lr, mu, last: train(x, y, mask, lr, mu, last=last)
    if extra:
        return lambda x, y, mask, lr, mu, keep, last: train(x, y, mask, lr, mu, keep=keep, last=last)
    return lambda x, y, mask, lr, mu: train(x, y, mask, lr, mu)


def _without_dropout(gradient: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: gradient(x, y)


class _Sum:
    """Gradients of several calls, added up until the last."""

    def __init__(self, module: Any, count: int) -> None:
        module.total_gradient = tf.Variable(tf.zeros([count]), name="total_gradient")
        module.total_weight = tf.Variable(tf.zeros([1]), name="total_weight")
        self._module = module

    def mean(self, gradient: Tensor, weight: Tensor, last: Tensor) -> Tensor:
        """The mean gradient so far; forgets it all if `last` is 1."""
        gradient = self._module.total_gradient.read_value() + gradient
        weights = self._module.total_weight.read_value() + weight
        self._module.total_gradient.assign(gradient * (1.0 - last))
        self._module.total_weight.assign(weights * (1.0 - last))
        return gradient / weights

    def reset(self, weights: Tensor) -> None:
        """Start anew. Zeros are made of the weights: as a constant they would be in the file."""
        self._module.total_gradient.assign(weights * 0.0)
        self._module.total_weight.assign([0.0])


class _Rule:
    """An optimizer: from gradient and learning rate to what is taken off the parameters.

    Formulas and constants are those of Keras's SGD and Adam.
    """

    def __init__(self, module: Any, count: int, spec: OptimizerSpec) -> None:
        self._module, self._spec = module, spec
        if spec.kind != "sgd":
            module.first = tf.Variable(tf.zeros([count]), name="first")
        if spec.kind == "adam":
            module.second = tf.Variable(tf.zeros([count]), name="second")
            # beta_1 and beta_2 to the power of the steps taken.
            module.powers = tf.Variable(tf.ones([2]), name="powers")

    def step(self, gradient: Tensor, lr: Tensor, last: Tensor | None) -> Tensor:
        """What to subtract; nothing, and nothing changes, if `last` is 0."""
        spec, module = self._spec, self._module
        if spec.kind == "sgd":
            change = lr * gradient
        elif spec.kind == "momentum":
            first = module.first.read_value()
            new = spec.beta_1 * first + lr * gradient
            module.first.assign(_chosen(new, first, last))
            change = new
        else:
            first, second = module.first.read_value(), module.second.read_value()
            powers = module.powers.read_value()
            new = first + (gradient - first) * (1.0 - spec.beta_1)
            squares = second + (gradient * gradient - second) * (1.0 - spec.beta_2)
            later = powers * [spec.beta_1, spec.beta_2]
            module.first.assign(_chosen(new, first, last))
            module.second.assign(_chosen(squares, second, last))
            module.powers.assign(_chosen(later, powers, last))
            alpha = lr * tf.sqrt(1.0 - later[1:]) / (1.0 - later[:1])
            change = alpha * new / (tf.sqrt(squares) + spec.epsilon)
        return change if last is None else change * last

    def reset(self, weights: Tensor) -> None:
        """Forget everything."""
        kind, module = self._spec.kind, self._module
        if kind != "sgd":
            module.first.assign(weights * 0.0)
        if kind == "adam":
            module.second.assign(weights * 0.0)
            module.powers.assign([1.0, 1.0])


def _chosen(new: Tensor, old: Tensor, last: Tensor | None) -> Tensor:
    """`new` if `last` is 1, else `old`; without a comparison, which the small runtimes are slow at."""
    return new if last is None else new * last + old * (1.0 - last)
