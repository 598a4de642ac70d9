"""Server optimizers: how the mean update of a round moves the global parameters.

Each is two functions, `init` and `apply`, and reads like its paper. An update is local minus global
parameters, so that it is *added*: it plays the part of the negative gradient (Reddi et al. 2021, arXiv
2003.00295).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


class OptimizerError(ValueError):
    """A hyperparameter out of range, or an update that does not fit the state."""


@dataclass(frozen=True)
class OptimizerState:
    """Global parameters and what the optimizer remembers.

    Attributes:
        parameters: x, float32, shape (d,).
        rounds: updates applied so far.
        momentum: m, float32, shape (d,); None where the optimizer has none.
        second_moment: v, float32, shape (d,); None where the optimizer has none.
    """

    parameters: Vector
    rounds: int = 0
    momentum: Vector | None = None
    second_moment: Vector | None = None


class ServerOptimizer(Protocol):
    """An algorithm on the server's side of federated averaging; pure."""

    @property
    def learning_rate(self) -> float:
        """eta, by which it scales its step."""
        ...

    def init(self, parameters: Vector) -> OptimizerState:
        """Returns the state before the first round."""
        ...

    def apply(self, state: OptimizerState, mean_update: Vector) -> OptimizerState:
        """Returns the state after one more round; the old one is not changed.

        Raises:
            OptimizerError: the update has another shape or type, or holds NaN or infinity.
        """
        ...


@dataclass(frozen=True)
class FedAvg:
    """x + eta * update; eta = 1 is FedAvg proper (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1)."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate)

    def init(self, parameters: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        return OptimizerState(parameters.copy())

    def apply(self, state: OptimizerState, mean_update: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        _check_update(state, mean_update)
        return _moved(state, np.float32(self.learning_rate) * mean_update)


@dataclass(frozen=True)
class FedAvgM:
    """m = beta m + update; x + eta m (Hsu, Qi, Brown 2019, arXiv 1909.06335)."""

    learning_rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate)
        _check_decay(beta=self.beta)

    def init(self, parameters: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        return OptimizerState(parameters.copy(), momentum=np.zeros_like(parameters))

    def apply(self, state: OptimizerState, mean_update: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        _check_update(state, mean_update)
        momentum = np.float32(self.beta) * _memory(state.momentum) + mean_update
        return replace(_moved(state, np.float32(self.learning_rate) * momentum), momentum=momentum)


@dataclass(frozen=True)
class _Adaptive:
    """What FedAdagrad, FedAdam and FedYogi share (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).

    m = beta1 m + (1 - beta1) update; v by the subclass; x + eta m / (sqrt(v) + tau). As there, v starts at
    tau^2 and no bias is corrected.
    """

    learning_rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate, tau=self.tau)
        _check_decay(beta1=self.beta1)

    def init(self, parameters: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        return OptimizerState(
            parameters.copy(),
            momentum=np.zeros_like(parameters),
            second_moment=np.full_like(parameters, self.tau**2),
        )

    def apply(self, state: OptimizerState, mean_update: Vector) -> OptimizerState:
        """See `ServerOptimizer`."""
        _check_update(state, mean_update)
        beta1 = np.float32(self.beta1)
        momentum = beta1 * _memory(state.momentum) + (1 - beta1) * mean_update
        second_moment = self._accumulate(_memory(state.second_moment), mean_update * mean_update)
        step = np.float32(self.learning_rate) * momentum / (np.sqrt(second_moment) + np.float32(self.tau))
        return replace(_moved(state, step), momentum=momentum, second_moment=second_moment)

    def _accumulate(self, second_moment: Vector, square: Vector) -> Vector:
        raise NotImplementedError


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """v = v + update^2; usual with beta1 = 0."""

    beta1: float = 0.0

    def _accumulate(self, second_moment: Vector, square: Vector) -> Vector:
        return second_moment + square


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """v = beta2 v + (1 - beta2) update^2."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay(beta2=self.beta2)

    def _accumulate(self, second_moment: Vector, square: Vector) -> Vector:
        beta2 = np.float32(self.beta2)
        return beta2 * second_moment + (1 - beta2) * square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """v = v - (1 - beta2) update^2 sign(v - update^2)."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay(beta2=self.beta2)

    def _accumulate(self, second_moment: Vector, square: Vector) -> Vector:
        sign: Vector = np.sign(second_moment - square)
        return second_moment - np.float32(1 - self.beta2) * square * sign


class Server(StrEnum):
    """Names of the optimizers."""

    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAGRAD = "fedadagrad"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"


def server_optimizer(server: Server, learning_rate: float | None) -> ServerOptimizer:
    """The optimizer, at its own learning rate where none is given."""
    kind = {
        Server.FEDAVG: FedAvg,
        Server.FEDAVGM: FedAvgM,
        Server.FEDADAGRAD: FedAdagrad,
        Server.FEDADAM: FedAdam,
        Server.FEDYOGI: FedYogi,
    }[server]
    made: ServerOptimizer = kind() if learning_rate is None else kind(learning_rate=learning_rate)
    return made


def resumed(
    optimizer: ServerOptimizer, parameters: Vector, rounds: int, momentum: bytes | None, second: bytes | None
) -> OptimizerState:
    """The state before a campaign's next round: its present parameters, and what its rounds left in memory.

    Args:
        parameters: of the version that the round went on from, float32, shape (d,).
        rounds: updates applied so far.
        momentum, second: little-endian float32 of d elements, where the optimizer has such.

    Returns:
        The first state of the optimizer where the memory does not fit: it was another's, or of a model of
        another size, and a wrong step would be worse than none remembered.
    """
    first = optimizer.init(parameters)
    found = []
    for data, fresh in ((momentum, first.momentum), (second, first.second_moment)):
        if (data is None) != (fresh is None) or (data is not None and len(data) != 4 * parameters.size):
            return first
        found.append(None if data is None else np.frombuffer(data, "<f4").astype(np.float32))
    return OptimizerState(first.parameters, rounds, *found)


def memory(vector: Vector | None) -> bytes | None:
    """What `resumed` reads of a momentum or second moment."""
    return None if vector is None else vector.astype("<f4", copy=False).tobytes()


def _moved(state: OptimizerState, step: Vector) -> OptimizerState:
    return replace(state, parameters=state.parameters + step, rounds=state.rounds + 1)


def _memory(vector: Vector | None) -> Vector:
    if vector is None:
        raise OptimizerError("the state was made by another optimizer")
    return vector


def _check_update(state: OptimizerState, mean_update: Vector) -> None:
    if mean_update.shape != state.parameters.shape or mean_update.dtype != np.float32:
        raise OptimizerError(
            f"need a float32 update of shape {state.parameters.shape}, "
            f"got {mean_update.dtype} {mean_update.shape}"
        )
    if not np.isfinite(mean_update).all():
        raise OptimizerError("the mean update holds NaN or infinity")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise OptimizerError(f"{name} is positive and finite, got {value}")


def _check_decay(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise OptimizerError(f"{name} lies in [0, 1), got {value}")
